/* Loops of data reduction. Observations are grouped by crystal: those of crystal c are start[c] .. start[c+1]-1.
 *
 * Model of an observation i of unique reflection h on crystal c, with s^2 = d*^2 / 4 and the squared Ewald offset l_i:
 *     m_i = g_i J_h,   log g_i = log_k[c] - 2 B[c] s^2 + (l_i (1 - exp(-u)) - u) / 2,   u = width[c] + trend[h]
 *     v_i = a^2 (variance_i + (b^2 + c^2 l'_i) max(m_i, 0)^2),   l'_i = l_i exp(-u), the offset over the refined width
 */
#include "common.h"

/* What all loops over crystals begin with; trend and d_star_sq are of the unique reflections. Observations further than
 * max_offset from the Ewald sphere by the refined width are left out. */
#define CRYSTALS                                                                                                    \
    int64_t n_crystals, const int64_t *start, const uint8_t *include, const int32_t *unique, const double *intensity, \
        const float *offset_sq, const double *log_k, const double *b_factor, const double *width,                    \
        const double *d_star_sq, const double *trend, double max_offset

/* squared offset of observation i on crystal c over the refined width */
#define OFFSET(c, i, u) (offset_sq[i] * exp(-width[c] - trend[u]))

/* log g of observation i on crystal c */
#define LOG_G(c, i, u)                                \
    (log_k[c] - 0.5 * b_factor[c] * d_star_sq[u] +    \
     0.5 * (offset_sq[i] - OFFSET(c, i, u) - width[c] - trend[u]))

typedef struct {
    double a2, b2, c2; /* squares of the error model's a, b and c */
    double bound;   /* normalised deviation from which an observation loses weight; 0: none does */
} noise_t;

static inline int64_t pack(int64_t h, int64_t k, int64_t l) {
    const int64_t half = 1 << 19;
    return ((h + half) << 40) | ((k + half) << 20) | (l + half);
}

/* Key that all symmetry-equivalent and Friedel-related indices share: the largest packed index among them.
 * rotations are (n_rotations, 3, 3); an index is a row vector, h' = h R. minus[i] is 1 where only the Friedel mates of
 * the equivalents reach the largest key. */
void ssx_asu_keys(int64_t n, const int32_t *hkl, int64_t n_rotations, const double *rotations, int64_t *key,
                  uint8_t *minus) {
    for (int64_t i = 0; i < n; i++) {
        const double h = hkl[3 * i], k = hkl[3 * i + 1], l = hkl[3 * i + 2];
        int64_t best_plus = INT64_MIN, best_minus = INT64_MIN;
        for (int64_t r = 0; r < n_rotations; r++) {
            const double *R = rotations + 9 * r;
            const int64_t a = lrint(h * R[0] + k * R[3] + l * R[6]);
            const int64_t b = lrint(h * R[1] + k * R[4] + l * R[7]);
            const int64_t c = lrint(h * R[2] + k * R[5] + l * R[8]);
            const int64_t plus = pack(a, b, c), friedel = pack(-a, -b, -c);
            if (plus > best_plus) best_plus = plus;
            if (friedel > best_minus) best_minus = friedel;
        }
        minus[i] = best_minus > best_plus;
        key[i] = minus[i] ? best_minus : best_plus;
    }
}

static inline double variance_of(const noise_t *noise, double variance, double model, double refined_offset) {
    const double m = model > 0 ? model : 0;
    return noise->a2 * (variance + (noise->b2 + noise->c2 * refined_offset) * m * m);
}

/* Weight factor of an observation by its deviation from the mean of n, of which it is one. The share that it has in the
 * mean is taken as 1 / n: one by variances, which follow the mean, makes a reflection with an outlier jump for ever
 * between two states. */
static inline double robust_factor(const noise_t *noise, double residual, double v, double n) {
    if (noise->bound <= 0 || n < 1.5) return 1.0;
    const double z2 = residual * residual / (v * (1.0 - 1.0 / n)), bound2 = noise->bound * noise->bound;
    return z2 > bound2 ? bound2 / z2 : 1.0;
}

/* Weight factor of an observation by its offset: from half the largest offset on it falls to 0, without a step that would
 * keep widths from coming to rest. */
static inline double taper(double offset, double max_offset) {
    return offset <= 0.5 * max_offset ? 1.0 : offset >= max_offset ? 0.0 : 2.0 * (1.0 - offset / max_offset);
}

/* The nearest multiple of a power of two, for |x| below 2^51 of it. Sums of such numbers are exact, as long as they stay
 * below 2^53 of it, and do not depend on their order. */
static inline double on_grid(double x, double grid) {
    const double shift = 6755399441055744.0 * grid; /* 1.5 * 2^52 */
    return (x + shift) - shift;
}

/* Sums over the observations of the included crystals: numerator and weight of the merged intensity J = sum / weight,
 * and the number of observations, at 2 * unique + minus. J and N, that number for both mates together, are those of the
 * round before (N all 0: nothing is known, and no observation is down-weighted). What is added up is rounded to
 * multiples of sum_grid[u] and weight_grid[u]. */
void ssx_accumulate(CRYSTALS, const uint8_t *minus, const double *variance, const double *J, const double *N, double a2,
                    double b2, double c2, double bound, const double *sum_grid, const double *weight_grid, double *sum,
                    double *weight, double *count) {
    const noise_t noise = {a2, b2, c2, bound};
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset) continue;
            const double g = exp(LOG_G(c, i, u));
            const double refined = OFFSET(c, i, u);
            const double model = g * J[u], v = variance_of(&noise, variance[i], model, refined);
            const int64_t at = 2 * (int64_t)u + minus[i];
            const double w =
                robust_factor(&noise, intensity[i] - model, v, N[u]) * taper(refined, max_offset) * g / v;
            sum[at] += on_grid(w * intensity[i], sum_grid[u]);
            weight[at] += on_grid(w * g, weight_grid[u]);
            count[at] += 1;
        }
    }
}

/* Normal equations of an expectation-maximisation step for the scales, without priors. x[u] and x_sq[u] are the
 * expectations of the intensity and of its square; J and N, merged intensities and numbers of observations, find outliers (N = 0: none).
 * Parameters of crystal c: log_k, B, width (blocks of 3); common ones: the values of the trend at n_knots knots, of which
 * reflection u lies between knot[u] and knot[u] + 1 at the share[u] of the way.
 *     own (n, 3, 3), own_gradient (n, 3), cross (n, 3, n_knots), common (n, n_knots, n_knots + 1), its last column the
 *     gradient; all apart for each crystal
 * used[c]: observations that took part. */
void ssx_scale_equations(CRYSTALS, const double *variance, const double *J, const double *N, const double *x,
                         const double *x_sq, double a2, double b2, double c2, double bound, int64_t n_knots, const int32_t *knot,
                         const double *share, double *own, double *own_gradient, double *cross, double *common,
                         int64_t *used) {
    const noise_t noise = {a2, b2, c2, bound};
    for (int64_t c = 0; c < n_crystals; c++) {
        used[c] = 0;
        if (!include[c]) continue;
        double *A = own + 9 * c, *r = own_gradient + 3 * c, *C = cross + 3 * n_knots * c;
        double *T = common + n_knots * (n_knots + 1) * c;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset || x_sq[u] <= 0) continue;
            const double g = exp(LOG_G(c, i, u));
            const double refined = OFFSET(c, i, u);
            const double v = variance_of(&noise, variance[i], g * sqrt(x_sq[u]), refined);
            const double w =
                robust_factor(&noise, intensity[i] - g * J[u], v, N[u]) * taper(refined, max_offset) / v;
            const double curvature = w * g * g * x_sq[u], gradient = w * g * intensity[i] * x[u] - curvature;
            const double slope = 0.5 * (refined - 1.0);
            const double d[3] = {1.0, -0.5 * d_star_sq[u], slope};
            const double k[2] = {slope * (1.0 - share[u]), slope * share[u]};
            const int32_t first = knot[u];
            for (int p = 0; p < 3; p++) {
                r[p] += gradient * d[p];
                for (int q = 0; q < 3; q++) A[3 * p + q] += curvature * d[p] * d[q];
                for (int q = 0; q < 2; q++) C[n_knots * p + first + q] += curvature * d[p] * k[q];
            }
            for (int p = 0; p < 2; p++) {
                double *row = T + (n_knots + 1) * (first + p);
                for (int q = 0; q < 2; q++) row[first + q] += curvature * k[p] * k[q];
                row[n_knots] += gradient * k[p];
            }
            used[c]++;
        }
    }
}

/* of numbers about 1, of which there may be 10^8; 2^-24 */
#define DEVIATION_GRID 5.9604644775390625e-08

/* Per bin of m / sqrt(variance), and in each by refined offset, over reflections with several observations: sums for the
 * error model. sums are (n_bins, n_offsets, 6): number, sum of z^2, of variance / v, of m^2 / v, of l' m^2 / v, and of m,
 * where z^2 = (I - m)^2 / (v (1 - leverage)), for observations with |z| < cut. Bin k holds edges[k] <= m / sqrt(variance)
 * < edges[k + 1], and likewise for the offsets. */
void ssx_deviations(CRYSTALS, const double *variance, const double *J, const double *W, double a2, double b2, double c2,
                    double cut, int64_t n_bins, const double *edges, int64_t n_offsets, const double *offset_edges,
                    double *sums) {
    const noise_t noise = {a2, b2, c2, 0};
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset || W[u] <= 0) continue;
            const double g = exp(LOG_G(c, i, u)), refined = OFFSET(c, i, u);
            const double model = g * J[u], v = variance_of(&noise, variance[i], model, refined);
            const double leverage = g * g / (v * W[u]);
            if (leverage > 0.5) continue;
            const double residual = intensity[i] - model, z2 = residual * residual / (v * (1.0 - leverage));
            if (z2 > cut * cut) continue;
            const double m = model > 0 ? model : 0, signal = m / sqrt(variance[i]);
            int64_t k = 0, l = 0;
            while (k < n_bins - 1 && signal >= edges[k + 1]) k++;
            while (l < n_offsets - 1 && refined >= offset_edges[l + 1]) l++;
            double *s = sums + 6 * (n_offsets * k + l);
            s[0] += 1;
            s[1] += on_grid(z2, DEVIATION_GRID);
            s[2] += on_grid(variance[i] / v, DEVIATION_GRID);
            s[3] += on_grid(m * m / v, DEVIATION_GRID);
            s[4] += on_grid(refined * m * m / v, DEVIATION_GRID);
            s[5] += m;
        }
    }
}

/* Sums per unique reflection for R factors, unweighted: (n_unique, 3) of n, scaled intensity, its square. */
void ssx_moments(CRYSTALS, double *sums) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset) continue;
            const double scaled = intensity[i] * exp(-LOG_G(c, i, u));
            sums[3 * (int64_t)u] += 1;
            sums[3 * (int64_t)u + 1] += scaled;
            sums[3 * (int64_t)u + 2] += scaled * scaled;
        }
    }
}

/* Sum over the observations of a unique reflection of |I/g - J|, at deviations[unique]. */
void ssx_absolute_deviations(CRYSTALS, const double *J, double *deviations) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset) continue;
            deviations[u] += fabs(intensity[i] * exp(-LOG_G(c, i, u)) - J[u]);
        }
    }
}

/* What leaving a crystal out changes, per crystal: (n_crystals, 4) changes of n, sum of y, sum of y^2 and sum of e over the unique
 * reflections with two or more observations, where y is the mean and e the variance of the mean of the observations
 * normalised by `unit` (the shell's mean intensity). moments are those of ssx_moments over all crystals. A crystal has
 * rarely more than one observation of a unique reflection; each is taken out on its own. */
void ssx_leave_out(CRYSTALS, const double *moments, const double *unit, double *changes) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        double *out = changes + 4 * c;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || OFFSET(c, i, u) >= max_offset || unit[u] <= 0) continue;
            const double *m = moments + 3 * (int64_t)u;
            const double n = m[0], scale = 1.0 / unit[u];
            if (n < 2) continue;
            const double x = scale * intensity[i] * exp(-LOG_G(c, i, u));
            const double s = m[1] * scale, ss = m[2] * scale * scale;
            const double y = s / n, e = (ss - n * y * y) / (n * (n - 1));
            out[0] -= 1;
            out[1] -= y;
            out[2] -= y * y;
            out[3] -= e;
            if (n < 3) continue;
            const double n1 = n - 1, y1 = (s - x) / n1, e1 = (ss - x * x - n1 * y1 * y1) / (n1 * (n1 - 1));
            out[0] += 1;
            out[1] += y1;
            out[2] += y1 * y1;
            out[3] += e1;
        }
    }
}

/* Weighted moments of each crystal's normalised intensities x against merged values in each setting.
 * setting_unique is (n_settings, n_observations). The merged value leaves the crystal's own contribution out, which it
 * made with probability p[c, s]. sums are (n_crystals, n_settings, 7): sum w^2, w, w x, w y, w x x, w y y, w x y. */
void ssx_setting_moments(int64_t n_crystals, const int64_t *start, int64_t n_observations, int64_t n_settings,
                         const int32_t *setting_unique, const double *x, const double *w, const double *probability,
                         const double *merged_sum, const double *merged_weight, double least_weight, double *sums) {
    for (int64_t c = 0; c < n_crystals; c++) {
        for (int64_t s = 0; s < n_settings; s++) {
            const int32_t *unique = setting_unique + s * n_observations;
            const double p = probability[c * n_settings + s];
            double square = 0, sw = 0, sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
            for (int64_t i = start[c]; i < start[c + 1]; i++) {
                const int32_t u = unique[i];
                if (u < 0) continue;
                const double others = merged_weight[u] - p * w[i];
                if (others <= least_weight) continue;
                const double y = (merged_sum[u] - p * w[i] * x[i]) / others;
                /* the merged value's own noise: Wilson's variance of 1 in it is worth w -> w others / (1 + others) */
                const double q = w[i] * others / (1.0 + others);
                square += q * q;
                sw += q;
                sx += q * x[i];
                sy += q * y;
                sxx += q * x[i] * x[i];
                syy += q * y * y;
                sxy += q * x[i] * y;
            }
            double *out = sums + 7 * (c * n_settings + s);
            out[0] = square;
            out[1] = sw;
            out[2] = sx;
            out[3] = sy;
            out[4] = sxx;
            out[5] = syy;
            out[6] = sxy;
        }
    }
}

/* Sums of the normalised intensities over the crystals, each spread over its settings by probability. */
void ssx_setting_accumulate(int64_t n_crystals, const int64_t *start, int64_t n_observations, int64_t n_settings,
                            const int32_t *setting_unique, const double *x, const double *w, const double *probability,
                            double *merged_sum, double *merged_weight) {
    for (int64_t c = 0; c < n_crystals; c++) {
        for (int64_t s = 0; s < n_settings; s++) {
            const double p = probability[c * n_settings + s];
            if (p <= 0) continue;
            const int32_t *unique = setting_unique + s * n_observations;
            for (int64_t i = start[c]; i < start[c + 1]; i++) {
                const int32_t u = unique[i];
                if (u < 0) continue;
                merged_sum[u] += p * w[i] * x[i];
                merged_weight[u] += p * w[i];
            }
        }
    }
}
