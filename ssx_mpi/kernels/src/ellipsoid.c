/* Log-likelihood of the strong spots under the ellipsoid model, its score and its Fisher information, derived in
 * kernels/ellipsoid_refinement.py; and the concentration step of kernels/ellipsoid_outliers.py. */
#include "common.h"

enum { MAX_PARAMETERS = 16 };

/* b = r a r^T for symmetric a */
static void rotate(const double *r, const double *a, double *b) {
    double t[9];
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) t[3 * i + j] = r[3 * i] * a[j] + r[3 * i + 1] * a[3 + j] + r[3 * i + 2] * a[6 + j];
    for (int i = 0; i < 3; i++)
        for (int j = i; j < 3; j++)
            b[3 * i + j] = b[3 * j + i] = t[3 * i] * r[3 * j] + t[3 * i + 1] * r[3 * j + 1] + t[3 * i + 2] * r[3 * j + 2];
}

/* frame: rows e1, e2, e3 per spot; observed: mean e1, e2, covariance 11, 12, 22 per spot
 * sigma: (n or 1, 9); d_s2: (n, n_crystal, 3); d_sigma: (n or 1, n_mosaic, 9); `step` = 1 when per spot, 0 when shared
 * parameters: crystal first, then mosaicity; score and information may be NULL. Returns -infinity when a covariance is
 * not positive definite. */
double ssx_ellipsoid_likelihood(int64_t n, double radius, const double *frame, const double *weight,
                                const double *observed, const double *s2, const double *sigma, int sigma_step,
                                int n_crystal, const double *d_s2, int n_mosaic, const double *d_sigma, int d_sigma_step,
                                int gradients, double *score, double *information) {
    int np = n_crystal + n_mosaic;
    double total = 0;
    if (gradients) {
        memset(score, 0, np * sizeof(double));
        memset(information, 0, (size_t)np * np * sizeof(double));
    }
    for (int64_t h = 0; h < n; h++) {
        const double *r = frame + 9 * h, *o = observed + 5 * h, *v = s2 + 3 * h;
        double s[9], mu[3];
        rotate(r, sigma + (size_t)sigma_step * 9 * h, s);
        for (int i = 0; i < 3; i++) mu[i] = r[3 * i] * v[0] + r[3 * i + 1] * v[1] + r[3 * i + 2] * v[2];

        /* marginal along e3, and the distribution on the Ewald sphere conditional on it */
        double s22 = s[8], epsilon = radius - mu[2], g0 = s[2] / s22, g1 = s[5] / s22;
        double c00 = s[0] - g0 * s[2], c01 = s[1] - g0 * s[5], c11 = s[4] - g1 * s[5];
        double det = c00 * c11 - c01 * c01;
        if (!(s22 > 0) || !(det > 0)) return -INFINITY;
        double i00 = c11 / det, i01 = -c01 / det, i11 = c00 / det;
        double d0 = o[0] - mu[0] - g0 * epsilon, d1 = o[1] - mu[1] - g1 * epsilon;
        double v00 = o[2] + d0 * d0, v01 = o[3] + d0 * d1, v11 = o[4] + d1 * d1;
        double w = weight[h];
        total -= 0.5 * w * (log(s22) + epsilon * epsilon / s22 + log(det) + i00 * v00 + 2 * i01 * v01 + i11 * v11);
        if (!gradients) continue;

        /* K = C^-1 - C^-1 V C^-1, y = C^-1 d */
        double y0 = i00 * d0 + i01 * d1, y1 = i01 * d0 + i11 * d1;
        double a00 = i00 * v00 + i01 * v01, a01 = i00 * v01 + i01 * v11, a10 = i01 * v00 + i11 * v01,
               a11 = i01 * v01 + i11 * v11;
        double k00 = i00 - (a00 * i00 + a01 * i01), k01 = i01 - (a00 * i01 + a01 * i11),
               k11 = i11 - (a10 * i01 + a11 * i11);

        double dm[MAX_PARAMETERS][2], dc[MAX_PARAMETERS][3], ds22[MAX_PARAMETERS], dmu2[MAX_PARAMETERS];
        for (int p = 0; p < np; p++) {
            if (p < n_crystal) {
                const double *q = d_s2 + ((size_t)h * n_crystal + p) * 3;
                double m[3];
                for (int i = 0; i < 3; i++) m[i] = r[3 * i] * q[0] + r[3 * i + 1] * q[1] + r[3 * i + 2] * q[2];
                ds22[p] = 0;
                dmu2[p] = m[2];
                dm[p][0] = m[0] - g0 * m[2];
                dm[p][1] = m[1] - g1 * m[2];
                dc[p][0] = dc[p][1] = dc[p][2] = 0;
            } else {
                double t[9];
                rotate(r, d_sigma + ((size_t)d_sigma_step * n_mosaic * h + p - n_crystal) * 9, t);
                double e0 = (t[2] - g0 * t[8]) / s22, e1 = (t[5] - g1 * t[8]) / s22; /* change of g */
                ds22[p] = t[8];
                dmu2[p] = 0;
                dm[p][0] = e0 * epsilon;
                dm[p][1] = e1 * epsilon;
                dc[p][0] = t[0] - e0 * s[2] - g0 * t[2];
                dc[p][1] = t[1] - e0 * s[5] - g0 * t[5];
                dc[p][2] = t[4] - e1 * s[5] - g1 * t[5];
            }
            double marginal = ds22[p] / s22 * (1 - epsilon * epsilon / s22) - 2 * epsilon * dmu2[p] / s22;
            double conditional = k00 * dc[p][0] + 2 * k01 * dc[p][1] + k11 * dc[p][2];
            double shift = -2 * (y0 * dm[p][0] + y1 * dm[p][1]);
            score[p] -= 0.5 * w * (marginal + conditional + shift);
        }
        for (int p = 0; p < np; p++) {
            /* C^-1 dC C^-1 and C^-1 dm of the one parameter against the other */
            double b00 = i00 * dc[p][0] + i01 * dc[p][1], b01 = i00 * dc[p][1] + i01 * dc[p][2],
                   b10 = i01 * dc[p][0] + i11 * dc[p][1], b11 = i01 * dc[p][1] + i11 * dc[p][2];
            double f00 = b00 * i00 + b01 * i01, f01 = b00 * i01 + b01 * i11, f11 = b10 * i01 + b11 * i11;
            double m0 = i00 * dm[p][0] + i01 * dm[p][1], m1 = i01 * dm[p][0] + i11 * dm[p][1];
            for (int q = 0; q <= p; q++) {
                double sum = ds22[p] * ds22[q] / (s22 * s22) + 2 * dmu2[p] * dmu2[q] / s22 + f00 * dc[q][0] +
                             2 * f01 * dc[q][1] + f11 * dc[q][2] + 2 * (m0 * dm[q][0] + m1 * dm[q][1]);
                information[p * np + q] += 0.5 * w * sum;
            }
        }
    }
    if (gradients)
        for (int p = 0; p < np; p++)
            for (int q = 0; q < p; q++) information[q * np + p] = information[p * np + q];
    return total;
}

/* The k-th smallest of n values (k from 0); what is left of them in `values` and `other` means nothing. Parts are copied
 * without branches from one to the other: which side a value goes to cannot be foreseen. */
INLINED double select_smallest(double *values, double *other, int64_t n, int64_t k) {
    enum { SAMPLE = 7, FEW = 12 };
    while (n > FEW) {
        double sample[SAMPLE];
        for (int i = 0; i < SAMPLE; i++) {
            const double v = values[(2 * i + 1) * n / (2 * SAMPLE)];
            int j = i;
            for (; j > 0 && sample[j - 1] > v; j--) sample[j] = sample[j - 1];
            sample[j] = v;
        }
        const double pivot = sample[SAMPLE * k / n];
        int64_t below = 0;
        for (int64_t i = 0; i < n; i++) {
            const double v = values[i];
            other[below] = v;
            other[n - 1 - (i - below)] = v;
            below += v < pivot;
        }
        double *rest = other;
        if (k < below) {
            n = below;
        } else if (below > 0) {
            rest += below;
            n -= below;
            k -= below;
        } else {
            /* the pivot is the smallest */
            int64_t above = 0;
            for (int64_t i = 0; i < n; i++) {
                const double v = other[i];
                other[above] = v;
                above += v > pivot;
            }
            if (k < n - above) return pivot;
            k -= n - above;
            n = above;
        }
        other = values;
        values = rest;
    }
    for (int64_t i = 1; i < n; i++) {
        const double v = values[i];
        int64_t j = i;
        for (; j > 0 && values[j - 1] > v; j--) values[j] = values[j - 1];
        values[j] = v;
    }
    return values[k];
}

#define PARTS 4
typedef double parts __attribute__((vector_size(8 * PARTS), aligned(8)));
typedef int64_t chosen __attribute__((vector_size(8 * PARTS), aligned(8)));

static inline double sum_of(const parts *sum) {
    double part[PARTS];
    memcpy(part, sum, sizeof part);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* Concentration of location (x, y) and scatter (xx, xy, yy) estimates: replaced by those of the `half` points nearest to
 * them. determinant is that of the new scatter, or infinite when the old one has none. points: x of all, then y of all.
 * scratch: 3 n doubles. */
WIDE void ssx_concentration(int64_t n, const double *points, int64_t half, int64_t n_estimates, double *location,
                            double *scatter, double *determinant, double *scratch) {
    double *distance = scratch, *sorted = scratch + n, *other = scratch + 2 * n;
    const double *px = points, *py = points + n;
    for (int64_t e = 0; e < n_estimates; e++) {
        double *m = location + 2 * e, *s = scatter + 3 * e, det = s[0] * s[2] - s[1] * s[1];
        determinant[e] = INFINITY;
        if (!(det > 1e-12 * (s[0] + s[2]) * (s[0] + s[2]))) continue;
        const double x0 = m[0], y0 = m[1], sxx0 = s[0], sxy0 = s[1], syy0 = s[2];
        for (int64_t i = 0; i < n; i++) {
            const double x = px[i] - x0, y = py[i] - y0;
            sorted[i] = distance[i] = syy0 * x * x - 2 * sxy0 * x * y + sxx0 * y * y;
        }
        const double limit = select_smallest(sorted, other, n, half - 1);
        int64_t below = 0, within = 0;
        for (int64_t i = 0; i < n; i++) {
            below += distance[i] < limit;
            within += distance[i] <= limit;
        }
        /* so many of those at the limit are taken, the first ones */
        for (int64_t i = 0, ties = half - below; within > half && i < n; i++)
            if (distance[i] == limit && ties-- <= 0) distance[i] = INFINITY;
        parts sx = {0}, sy = {0}, sxx = {0}, sxy = {0}, syy = {0};
        int64_t i = 0;
        for (; i + PARTS <= n; i += PARTS) {
            const chosen taken = *(const parts *)(distance + i) <= limit;
            const parts x = (parts)((chosen)(*(const parts *)(px + i) - x0) & taken);
            const parts y = (parts)((chosen)(*(const parts *)(py + i) - y0) & taken);
            sx += x;
            sy += y;
            sxx += x * x;
            sxy += x * y;
            syy += y * y;
        }
        for (int lane = 0; i < n; i++, lane++) {
            if (distance[i] > limit) continue;
            const double x = px[i] - x0, y = py[i] - y0;
            sx[lane] += x;
            sy[lane] += y;
            sxx[lane] += x * x;
            sxy[lane] += x * y;
            syy[lane] += y * y;
        }
        const double tx = sum_of(&sx), ty = sum_of(&sy);
        m[0] = x0 + tx / half;
        m[1] = y0 + ty / half;
        s[0] = (sum_of(&sxx) - tx * tx / half) / (half - 1);
        s[1] = (sum_of(&sxy) - tx * ty / half) / (half - 1);
        s[2] = (sum_of(&syy) - ty * ty / half) / (half - 1);
        determinant[e] = s[0] * s[2] - s[1] * s[1];
    }
}
