/* Loops of data reduction. Observations are grouped by crystal: those of crystal c are start[c] .. start[c+1]-1.
 *
 * Model of an observation i of unique reflection h on crystal c, with s^2 = d*^2 / 4:
 *     m_i = g_i J_h,   g_i = exp(log_k[c] - 2 B[c] s^2) = exp(log_k[c] - B[c] d*^2 / 2)
 *     v_i = a^2 (variance_i + b^2 max(m_i, 0)^2)
 */
#include "common.h"

typedef struct {
    double a2, b2;  /* a^2 and b^2 of the error model */
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

static inline double variance_of(const noise_t *noise, double variance, double model) {
    const double m = model > 0 ? model : 0;
    return noise->a2 * (variance + noise->b2 * m * m);
}

/* Weight factor of an observation by its deviation from the model, leverage taken into account. */
static inline double robust_factor(const noise_t *noise, double residual, double v, double leverage) {
    if (noise->bound <= 0 || leverage > 0.95) return 1.0;
    const double z2 = residual * residual / (v * (1.0 - leverage)), bound2 = noise->bound * noise->bound;
    return z2 > bound2 ? bound2 / z2 : 1.0;
}

/* Sums over the observations of the included crystals: numerator and weight of the merged intensity J = sum / weight,
 * and the number of observations, at 2 * unique + minus. J and W are those of the round before (W all 0: no leverage
 * is known, and no observation is down-weighted). */
void ssx_accumulate(int64_t n_crystals, const int64_t *start, const uint8_t *include, const double *log_k,
                    const double *b_factor, const int32_t *unique, const uint8_t *minus, const double *intensity,
                    const double *variance, const double *d_star_sq, const double *J, const double *W, double a2,
                    double b2, double bound, double *sum, double *weight, double *count) {
    const noise_t noise = {a2, b2, bound};
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0) continue;
            const double g = exp(log_k[c] - 0.5 * b_factor[c] * d_star_sq[u]);
            const double model = g * J[u], v = variance_of(&noise, variance[i], model);
            double w = g / v;
            if (W[u] > 0) w *= robust_factor(&noise, intensity[i] - model, v, g * g / (v * W[u]));
            const int64_t at = 2 * (int64_t)u + minus[i];
            sum[at] += w * intensity[i];
            weight[at] += w * g;
            count[at] += 1;
        }
    }
}

/* Gauss-Newton for log_k and B of each crystal against the merged intensities, one step per call.
 * Minimises sum_i rho_i (I_i - m_i)^2 / (v_i + g_i^2 / W_h) + (B - prior_b)^2 / prior_b_sigma^2; the second term of the variance is
 * the uncertainty of J. With fit_b = 0 only the scale moves. step[c] receives the largest change that matters:
 * |delta log_k| + |delta B| d*^2_mean / 2. used[c]: observations that took part. */
void ssx_fit_scales(int64_t n_crystals, const int64_t *start, const uint8_t *include, const int32_t *unique,
                    const double *intensity, const double *variance, const double *d_star_sq, const double *J,
                    const double *W, double a2, double b2, double bound, int32_t fit_b, double prior_b, double prior_b_sigma,
                    double *log_k, double *b_factor, double *step, int64_t *used) {
    const noise_t noise = {a2, b2, bound};
    for (int64_t c = 0; c < n_crystals; c++) {
        step[c] = 0;
        used[c] = 0;
        if (!include[c]) continue;
        double a00 = 0, a01 = 0, a11 = 0, r0 = 0, r1 = 0, q_sum = 0;
        int64_t n = 0;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || W[u] <= 0) continue;
            const double q = 0.5 * d_star_sq[u];
            const double g = exp(log_k[c] - b_factor[c] * q), model = g * J[u];
            const double own = variance_of(&noise, variance[i], model), v = own + g * g / W[u];
            const double residual = intensity[i] - model;
            const double w = robust_factor(&noise, residual, own, g * g / (own * W[u])) / v;
            const double d0 = model, d1 = -model * q; /* derivatives by log_k and B */
            a00 += w * d0 * d0;
            a01 += w * d0 * d1;
            a11 += w * d1 * d1;
            r0 += w * d0 * residual;
            r1 += w * d1 * residual;
            q_sum += q;
            n++;
        }
        used[c] = n;
        if (n < 2 || a00 <= 0) continue;
        double dk, db = 0;
        if (fit_b) {
            const double prior = 1.0 / (prior_b_sigma * prior_b_sigma);
            a11 += prior;
            r1 += (prior_b - b_factor[c]) * prior;
            const double det = a00 * a11 - a01 * a01;
            if (det <= 1e-12 * a00 * a11) continue;
            dk = (a11 * r0 - a01 * r1) / det;
            db = (a00 * r1 - a01 * r0) / det;
        } else {
            dk = r0 / a00;
        }
        /* far from the solution the exponential is not linear: no step beyond a factor of e */
        const double q_mean = q_sum / n, size = fabs(dk - db * q_mean) + fabs(db) * q_mean;
        const double shrink = size > 1.0 ? 1.0 / size : 1.0;
        log_k[c] += shrink * dk;
        b_factor[c] += shrink * db;
        step[c] = shrink * size;
    }
}

/* Per bin of m / sqrt(variance) and over reflections with several observations: sums for the error model.
 * sums are (n_bins, 5): number, sum of z^2, of variance / v, of m^2 / v, and of m, where z^2 = (I - m)^2 / (v (1 - leverage)), for
 * observations with |z| < cut. Bin k holds edges[k] <= m / sqrt(variance) < edges[k + 1]. */
void ssx_deviations(int64_t n_crystals, const int64_t *start, const uint8_t *include, const double *log_k,
                    const double *b_factor, const int32_t *unique, const double *intensity, const double *variance,
                    const double *d_star_sq, const double *J, const double *W, double a2, double b2, double cut,
                    int64_t n_bins, const double *edges, double *sums) {
    const noise_t noise = {a2, b2, 0};
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || W[u] <= 0) continue;
            const double g = exp(log_k[c] - 0.5 * b_factor[c] * d_star_sq[u]);
            const double model = g * J[u], v = variance_of(&noise, variance[i], model);
            const double leverage = g * g / (v * W[u]);
            if (leverage > 0.5) continue;
            const double residual = intensity[i] - model, z2 = residual * residual / (v * (1.0 - leverage));
            if (z2 > cut * cut) continue;
            const double m = model > 0 ? model : 0, signal = m / sqrt(variance[i]);
            int64_t k = 0;
            while (k < n_bins - 1 && signal >= edges[k + 1]) k++;
            double *s = sums + 5 * k;
            s[0] += 1;
            s[1] += z2;
            s[2] += variance[i] / v;
            s[3] += m * m / v;
            s[4] += m;
        }
    }
}

/* Sums per unique reflection for R factors, unweighted: (n_unique, 3) of n, scaled intensity, its square. */
void ssx_moments(int64_t n_crystals, const int64_t *start, const uint8_t *include, const double *log_k,
                 const double *b_factor, const int32_t *unique, const double *intensity, const double *d_star_sq,
                 double *sums) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0) continue;
            const double scaled = intensity[i] * exp(0.5 * b_factor[c] * d_star_sq[u] - log_k[c]);
            sums[3 * (int64_t)u] += 1;
            sums[3 * (int64_t)u + 1] += scaled;
            sums[3 * (int64_t)u + 2] += scaled * scaled;
        }
    }
}

/* Sum over the observations of a unique reflection of |I/g - J|, at deviations[unique]. */
void ssx_absolute_deviations(int64_t n_crystals, const int64_t *start, const uint8_t *include, const double *log_k,
                             const double *b_factor, const int32_t *unique, const double *intensity,
                             const double *d_star_sq, const double *J, double *deviations) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0) continue;
            deviations[u] += fabs(intensity[i] * exp(0.5 * b_factor[c] * d_star_sq[u] - log_k[c]) - J[u]);
        }
    }
}

/* What leaving a crystal out changes, per crystal: (n_crystals, 4) changes of n, sum of y, sum of y^2 and sum of e over the unique
 * reflections with two or more observations, where y is the mean and e the variance of the mean of the observations
 * normalised by `unit` (the shell's mean intensity). moments are those of ssx_moments over all crystals. A crystal has
 * rarely more than one observation of a unique reflection; each is taken out on its own. */
void ssx_leave_out(int64_t n_crystals, const int64_t *start, const uint8_t *include, const double *log_k,
                   const double *b_factor, const int32_t *unique, const double *intensity, const double *d_star_sq,
                   const double *moments, const double *unit, double *changes) {
    for (int64_t c = 0; c < n_crystals; c++) {
        if (!include[c]) continue;
        double *out = changes + 4 * c;
        for (int64_t i = start[c]; i < start[c + 1]; i++) {
            const int32_t u = unique[i];
            if (u < 0 || unit[u] <= 0) continue;
            const double *m = moments + 3 * (int64_t)u;
            const double n = m[0], scale = 1.0 / unit[u];
            if (n < 2) continue;
            const double x = scale * intensity[i] * exp(0.5 * b_factor[c] * d_star_sq[u] - log_k[c]);
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
