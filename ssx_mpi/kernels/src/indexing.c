#include "common.h"

/* Loops of the lattice search, in single precision: the candidates that come out are refined in double precision.
 * Spots come as three rows x, y, z of n_padded values, n of them true and the rest zero, n_padded a multiple of LANES,
 * and are worked on LANES at a time by the vector types of GCC and Clang, which every processor has in some width. */
#define LANES 8
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t choice __attribute__((vector_size(4 * LANES), aligned(4)));

/* Where the linker can choose at load time, the wider instructions serve the machines that have them; without fused
 * multiplications the results are the same. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* Nearest integer of |x| < 2^22: the sum is too large for a fraction. */
#define NEAREST(x) (((x) + 12582912.0f) - 12582912.0f)

/* sin(2 pi t) and cos(2 pi t) for |t| <= 1/2, least-squares polynomials, to 2e-5; s = t^2 */
#define SIN_CYCLES(t, s) \
    ((t) * (1.0f - 4.0f * (s)) * (6.2830426f + (s) * (-16.1982159f + (s) * (16.5602573f + (s) * -8.1545029f))))
#define COS_CYCLES(s) (0.9999590f + (s) * (-19.7309424f + (s) * (64.6714418f + (s) * (-82.3908063f + (s) * 45.6210511f))))

static inline float lane_sum(const float *lane) {
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

/* For each direction n the largest of |sum_j exp(2 pi i L n.q_j)| over the lengths L = first + k step, k < n_lengths,
 * and its k. work: 2 LANES n_lengths floats. */
WIDE void ssx_period_amplitudes(const float *q, int n, int n_padded, const float *directions, int64_t n_directions,
                                float first, float step, int n_lengths, float *work, float *amplitude,
                                int32_t *best) {
    for (int64_t d = 0; d < n_directions; d++) {
        const float a = directions[3 * d], b = directions[3 * d + 1], c = directions[3 * d + 2];
        memset(work, 0, 2 * LANES * (size_t)n_lengths * sizeof(float));
        for (int j = 0; j < n_padded; j += LANES) {
            const lanes x = *(const lanes *)(q + j), y = *(const lanes *)(q + n_padded + j);
            const lanes p = a * x + b * y + c * *(const lanes *)(q + 2 * n_padded + j);
            lanes t = p * first, u = p * step;
            t -= NEAREST(t);
            u -= NEAREST(u);
            const lanes tt = t * t, uu = u * u;
            lanes re = COS_CYCLES(tt), im = SIN_CYCLES(t, tt);
            const lanes turn_re = COS_CYCLES(uu), turn_im = SIN_CYCLES(u, uu);
            lanes *sum = (lanes *)work;
            for (int k = 0; k < n_lengths; k++, sum += 2) {
                sum[0] += re;
                sum[1] += im;
                const lanes next = re * turn_re - im * turn_im;
                im = re * turn_im + im * turn_re;
                re = next;
            }
        }
        float largest = -1.0f;
        int at = 0;
        for (int k = 0; k < n_lengths; k++) {
            /* the padding lies at the origin and adds one each to the real part */
            const float re = lane_sum(work + 2 * LANES * k) - (float)(n_padded - n);
            const float im = lane_sum(work + 2 * LANES * k + LANES);
            const float square = re * re + im * im;
            if (square > largest) {
                largest = square;
                at = k;
            }
        }
        amplitude[d] = sqrtf(largest);
        best[d] = at;
    }
}

/* For each basis (rows) sum_j max(0, 1 - |h_j - nint(h_j)|^2 / tolerance^2) with h = basis q. */
WIDE void ssx_explained(const float *q, int n, int n_padded, const float *bases, int64_t n_bases, float tolerance,
                        float *score) {
    const float scale = 1.0f / (tolerance * tolerance);
    for (int64_t b = 0; b < n_bases; b++) {
        const float *m = bases + 9 * b;
        lanes sum = {0};
        for (int j = 0; j < n_padded; j += LANES) {
            const lanes x = *(const lanes *)(q + j), y = *(const lanes *)(q + n_padded + j);
            const lanes z = *(const lanes *)(q + 2 * n_padded + j);
            lanes h = m[0] * x + m[1] * y + m[2] * z;
            lanes k = m[3] * x + m[4] * y + m[5] * z;
            lanes l = m[6] * x + m[7] * y + m[8] * z;
            h -= NEAREST(h);
            k -= NEAREST(k);
            l -= NEAREST(l);
            const lanes w = 1.0f - scale * (h * h + k * k + l * l);
            const choice positive = w > 0.0f;
            sum += (lanes)((choice)w & positive);
        }
        float part[LANES];
        memcpy(part, &sum, sizeof part);
        score[b] = lane_sum(part) - (float)(n_padded - n);
    }
}
