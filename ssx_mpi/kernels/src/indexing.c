#include "common.h"

/* Loops of the lattice search, in single precision: the candidates that come out are refined in double precision, by
 * the derivatives at the end of this file.
 * Spots come as three rows x, y, z of n_padded values, n of them true and the rest zero, n_padded a multiple of LANES,
 * and are worked on LANES at a time by the vector types of GCC and Clang, which every processor has in some width. */
#define LANES 8
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t choice __attribute__((vector_size(4 * LANES), aligned(4)));

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

/* For each vector v (n_vectors, 3) sum_j cos(2 pi q_j.v). */
WIDE void ssx_cosine_sums(const float *q, int n, int n_padded, const float *vectors, int64_t n_vectors, float *sums) {
    for (int64_t i = 0; i < n_vectors; i++) {
        const float a = vectors[3 * i], b = vectors[3 * i + 1], c = vectors[3 * i + 2];
        lanes sum = {0};
        for (int j = 0; j < n_padded; j += LANES) {
            const lanes x = *(const lanes *)(q + j), y = *(const lanes *)(q + n_padded + j);
            lanes t = a * x + b * y + c * *(const lanes *)(q + 2 * n_padded + j);
            t -= NEAREST(t);
            const lanes tt = t * t;
            sum += COS_CYCLES(tt);
        }
        float part[LANES];
        memcpy(part, &sum, sizeof part);
        sums[i] = lane_sum(part) - (float)(n_padded - n);
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

/* Rays, positions on the panel and delta psi of the reciprocal lattice points q (n, 3), and the derivatives of position
 * and delta psi along dq (n_parameters, n, 3); the equations stand in lattice_refinement.py. d_inverse (n, 3, 3);
 * s1 (n, 3), xy (n, 2), psi (n), dxy (n_parameters, n, 2), dpsi (n_parameters, n). */
void ssx_still_prediction(const double *q, const double *dq, int64_t n, int n_parameters, const double *d_inverse,
                          const double *s0, double *s1, double *xy, double *psi, double *dxy, double *dpsi) {
    const double wavenumber = sqrt(s0[0] * s0[0] + s0[1] * s0[1] + s0[2] * s0[2]);
    const double u[3] = {s0[0] / wavenumber, s0[1] / wavenumber, s0[2] / wavenumber};
    for (int64_t i = 0; i < n; i++) {
        const double *g = q + 3 * i, *d = d_inverse + 9 * i;
        const double qu = g[0] * u[0] + g[1] * u[1] + g[2] * u[2];
        double c[3], v[3], *s = s1 + 3 * i;
        for (int k = 0; k < 3; k++) c[k] = g[k] - qu * u[k];
        const double qp = fmax(sqrt(c[0] * c[0] + c[1] * c[1] + c[2] * c[2]), 1e-12);
        for (int k = 0; k < 3; k++) c[k] /= qp;
        const double qq = qu * qu + qp * qp;
        const double a = 0.5 * qq / wavenumber, b = sqrt(fmax(qq - a * a, 1e-12));
        for (int k = 0; k < 3; k++) s[k] = s0[k] - a * u[k] + b * c[k];
        for (int k = 0; k < 3; k++) v[k] = d[3 * k] * s[0] + d[3 * k + 1] * s[1] + d[3 * k + 2] * s[2];
        const double x = v[0] / v[2], y = v[1] / v[2];
        xy[2 * i] = x;
        xy[2 * i + 1] = y;
        psi[i] = -atan2(qu, qp) - atan2(a, b);
        for (int p = 0; p < n_parameters; p++) {
            const double *e = dq + 3 * (p * n + i);
            const double du = e[0] * u[0] + e[1] * u[1] + e[2] * u[2];
            const double dp = e[0] * c[0] + e[1] * c[1] + e[2] * c[2];
            const double qdq = qu * du + qp * dp;
            const double da = qdq / wavenumber, db = (qdq - a * da) / b;
            double ds[3], dv[3];
            for (int k = 0; k < 3; k++)
                ds[k] = -da * u[k] + db * c[k] + (b / qp) * (e[k] - du * u[k] - dp * c[k]);
            for (int k = 0; k < 3; k++) dv[k] = d[3 * k] * ds[0] + d[3 * k + 1] * ds[1] + d[3 * k + 2] * ds[2];
            dxy[2 * (p * n + i)] = (dv[0] - x * dv[2]) / v[2];
            dxy[2 * (p * n + i) + 1] = (dv[1] - y * dv[2]) / v[2];
            dpsi[p * n + i] = -(qp * du - qu * dp + b * da - a * db) / qq;
        }
    }
}

/* -sum log p of the delta psi of n spots at spacings d, without the constant, and its derivatives by alpha and eta:
 * out = value, gradient (2), second derivatives aa, ae, ee; the equations stand in mosaicity.py. */
void ssx_mosaicity_likelihood(const double *d, const double *psi, int64_t n, double alpha, double eta, double hardness,
                              double *out) {
    double value = 0, g0 = 0, g1 = 0, h00 = 0, h01 = 0, h11 = 0;
    for (int64_t i = 0; i < n; i++) {
        const double m = 0.5 * (d[i] * alpha + eta), z = psi[i] / m;
        const double up = hardness * (z + 1), down = hardness * (1 - z);
        const double e_up = exp(-fabs(up)), e_down = exp(-fabs(down));
        /* log(1 + e^t) and its derivative, without overflow */
        value += log(2 * m * (1 + e_up) * (1 + e_down)) + fmax(up, 0) + fmax(down, 0);
        const double s_up = (up > 0 ? 1 : e_up) / (1 + e_up), s_down = (down > 0 ? 1 : e_down) / (1 + e_down);
        const double slope = hardness * z * (s_up - s_down);
        const double curvature = s_up * (1 - s_up) + s_down * (1 - s_down);
        /* by log m: first and second derivative; m is linear, so that log m curves by minus the product */
        const double first = 1 - slope;
        const double second = hardness * hardness * z * z * curvature + slope - first;
        const double s0 = 0.5 * d[i] / m, s1 = 0.5 / m;
        g0 += s0 * first;
        g1 += s1 * first;
        h00 += s0 * s0 * second;
        h01 += s0 * s1 * second;
        h11 += s1 * s1 * second;
    }
    const double result[6] = {value, g0, g1, h00, h01, h11};
    memcpy(out, result, sizeof result);
}
