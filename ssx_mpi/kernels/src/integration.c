/* Pixels of reflections on one panel of one frame: footprint on the detector, background, summation, centroid.
 *
 * A footprint is an ellipse in the plane (e1, e2) tangential to the Ewald sphere at the reflection: a pixel belongs to
 * the foreground when one of its corners lies inside. The lab positions of the corners are bilinear in the pixel
 * coordinates over one box (exactly so without parallax, to 1e-4 pixels with it), so that a corner costs one square root.
 * Every function works on the reflections of one panel; the derivations are in kernels/shoeboxes.py.
 */
#include "common.h"

enum { VALID = 1, BACKGROUND = 2, FOREGROUND = 4, BACKGROUND_USED = 16 };
enum { FAILED_BACKGROUND = 1, FAILED_SUMMATION = 2, FAILED_CENTROID = 4, OVERLOADED = 8 };
enum { ROBUST_POISSON = 0, MEAN = 1 };
enum { SMALL_COUNTS = 256 };
/* variance of the readout where there is none, in squared counts */
static const double NO_READOUT = 1e-4;

/* panel: origin[3], fast[3], slow[3] in mm, pixel size x, y in mm, attenuation mu in 1/mm, thickness in mm */
static void pixel_to_lab(const double *panel, double x, double y, double lab[3]) {
    const double *origin = panel, *fast = panel + 3, *slow = panel + 6;
    double mu = panel[11], thickness = panel[12];
    double mm[2] = {x * panel[9], y * panel[10]};
    for (int k = 0; k < 3; k++) lab[k] = origin[k] + mm[0] * fast[k] + mm[1] * slow[k];
    if (mu <= 0 || thickness <= 0) return;
    /* the photon is absorbed at a mean depth behind the surface: shift the pixel back along its ray */
    double n[3] = {fast[1] * slow[2] - fast[2] * slow[1], fast[2] * slow[0] - fast[0] * slow[2],
                   fast[0] * slow[1] - fast[1] * slow[0]};
    double length = sqrt(lab[0] * lab[0] + lab[1] * lab[1] + lab[2] * lab[2]);
    double cosine = fabs(n[0] * lab[0] + n[1] * lab[1] + n[2] * lab[2]) / length;
    double depth = 1 / mu - (thickness / cosine + 1 / mu) * exp(-mu * thickness / cosine);
    double along_fast = (lab[0] * fast[0] + lab[1] * fast[1] + lab[2] * fast[2]) / length * depth;
    double along_slow = (lab[0] * slow[0] + lab[1] * slow[1] + lab[2] * slow[2]) / length * depth;
    for (int k = 0; k < 3; k++) lab[k] -= along_fast * fast[k] + along_slow * slow[k];
}

void ssx_pixel_to_lab(int64_t n, const double *panel, const double *xy, double *lab) {
    for (int64_t i = 0; i < n; i++) pixel_to_lab(panel, xy[2 * i], xy[2 * i + 1], lab + 3 * i);
}

static double dot(const double *a, const double *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

/* One box cut out of the frame: values, and mask codes that start as VALID or 0 (also outside of the panel) */
typedef struct {
    int x0, y0, nx, ny;
    double *value;
    uint8_t *code;
} box_t;

INLINED void cut_box(const void *frame, int is_float, const uint8_t *frame_mask, int height, int width, const int32_t *bbox,
                    box_t *box) {
    box->x0 = bbox[0];
    box->y0 = bbox[2];
    box->nx = bbox[1] - bbox[0];
    box->ny = bbox[3] - bbox[2];
    int first = box->x0 < 0 ? -box->x0 : 0, last = width - box->x0 < box->nx ? width - box->x0 : box->nx;
    memset(box->code, 0, (size_t)box->nx * box->ny);
    for (int j = 0; j < box->ny; j++) {
        int y = box->y0 + j;
        double *restrict value = box->value + (size_t)j * box->nx;
        if (first > 0 || last < box->nx || y < 0 || y >= height)
            for (int i = 0; i < box->nx; i++) value[i] = 0;
        if (y < 0 || y >= height || first >= last) continue;
        size_t at = (size_t)y * width + box->x0 + first;
        /* a NumPy bool is 0 or 1, which is VALID */
        memcpy(box->code + (size_t)j * box->nx + first, frame_mask + at, last - first);
        if (is_float) {
            memcpy(value + first, (const double *)frame + at, (last - first) * sizeof(double));
        } else {
            const int32_t *restrict from = (const int32_t *)frame + at;
            for (int i = 0; i < last - first; i++) value[first + i] = from[i];
        }
    }
}

/* e: axes e1[3], e2[3]; mean[2]; precision: xx, xy, yy of the inverse covariance; coordinates are radius * e . s/|s| */
INLINED void mark_ellipse(const double *panel, const double *e, const double *mean, const double *precision, double limit,
                         double radius, box_t *box, double *row) {
    double corner[4][3];
    int nx = box->nx, ny = box->ny;
    for (int k = 0; k < 4; k++) pixel_to_lab(panel, box->x0 + (k & 1) * nx, box->y0 + (k >> 1) * ny, corner[k]);
    double *above = row, *below = row + nx + 1;
    for (int j = 0; j <= ny; j++) {
        double t = (double)j / ny, start[3], step[3];
        for (int k = 0; k < 3; k++) {
            start[k] = corner[0][k] + t * (corner[2][k] - corner[0][k]);
            step[k] = (corner[1][k] + t * (corner[3][k] - corner[1][k]) - start[k]) / nx;
        }
        double u0 = dot(e, start), du = dot(e, step), v0 = dot(e + 3, start), dv = dot(e + 3, step);
        double q0 = dot(start, start), q1 = 2 * dot(start, step), q2 = dot(step, step);
        double m1 = mean[0], m2 = mean[1], pxx = precision[0], pxy = 2 * precision[1], pyy = precision[2];
        for (int i = 0; i <= nx; i++) {
            double scale = radius / sqrt(q0 + i * (q1 + i * q2));
            double a = (u0 + i * du) * scale - m1, b = (v0 + i * dv) * scale - m2;
            below[i] = a * a * pxx + a * b * pxy + b * b * pyy;
        }
        if (j > 0) {
            uint8_t *code = box->code + (size_t)(j - 1) * nx;
            for (int i = 0; i < nx; i++) {
                double upper = above[i] < above[i + 1] ? above[i] : above[i + 1];
                double lower = below[i] < below[i + 1] ? below[i] : below[i + 1];
                code[i] |= (upper < lower ? upper : lower) < limit ? FOREGROUND : BACKGROUND;
            }
        }
        double *swap = above;
        above = below;
        below = swap;
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double poisson(double mu, double k) { return k < 0 ? 0 : exp(k * log(mu) - mu - lgamma(k + 1)); }

/* Expectations of Huber's psi of the Pearson residual, and of psi times the score, for a Poisson variate:
 * Cantoni & Ronchetti (2001), appendix A. */
static void huber_expectations(double mu, double tuning, double *psi, double *psi_score) {
    double root = sqrt(mu), low = floor(mu - tuning * root), high = floor(mu + tuning * root);
    double p_low = poisson(mu, low), p_high = poisson(mu, high);
    double below = 0; /* P(Y < low) */
    double term = low > 0 ? p_low * low / mu : 0;
    for (double k = low - 1; k >= 0 && term > 1e-18 * (below + 1e-300); k--) {
        below += term;
        term *= k / mu;
    }
    double between = 0; /* P(low < Y < high) */
    double first = low < 0 ? 0 : low + 1;
    term = poisson(mu, first);
    for (double k = first; k < high; k++) {
        between += term;
        term *= mu / (k + 1);
    }
    double cumulative_low = below + p_low, above = 1 - cumulative_low - between - (high > low ? p_high : 0);
    *psi = tuning * (above - cumulative_low) + root * (p_low - p_high);
    double before_low = poisson(mu, low - 1), before_high = poisson(mu, high - 1);
    double inside = between + p_low; /* P(low <= Y < high) */
    *psi_score = tuning * (p_low + p_high) + root * (inside / mu + before_low - p_low - before_high + p_high);
}

/* Robust mean of Poisson counts (Huber's M-estimator, log link), started at the median. Returns 0 when it fails. */
INLINED int robust_poisson_mean(const double *y, int n, double tuning, int max_iterations, double *scratch, double *mean) {
    int32_t histogram[SMALL_COUNTS] = {0};
    int integers = 1, n_small = 0, n_large = 0, last = -1;
    for (int i = 0; i < n; i++) integers &= y[i] >= SMALL_COUNTS || y[i] == (int)y[i];
    for (int i = 0; i < n; i++) {
        int k = integers && y[i] < SMALL_COUNTS ? (int)y[i] : SMALL_COUNTS;
        if (k < SMALL_COUNTS) {
            histogram[k]++;
            n_small++;
            if (k > last) last = k;
        } else {
            scratch[n_large++] = y[i];
        }
    }
    if (n_large) qsort(scratch, n_large, sizeof(double), compare);
    double median;
    if (n / 2 < n_small) {
        int k = 0;
        for (int32_t seen = histogram[0]; seen <= n / 2; seen += histogram[k]) k++;
        median = k;
    } else {
        median = scratch[n / 2 - n_small];
    }
    double beta = log(median > 0 ? median : 1.0);
    for (int iteration = 0; iteration < max_iterations; iteration++) {
        double mu = exp(beta), root = sqrt(mu), expected, information, sum = 0;
        if (!(mu > 0) || !isfinite(mu)) return 0;
        huber_expectations(mu, tuning, &expected, &information);
        double low = mu - tuning * root, high = mu + tuning * root;
        for (int k = 0; k <= last; k++)
            sum += histogram[k] * ((k < low ? low : k > high ? high : k) - mu);
        for (int i = 0; i < n_large; i++)
            sum += (scratch[i] < low ? low : scratch[i] > high ? high : scratch[i]) - mu;
        /* score: sum(psi - E psi) sqrt(mu); information: n E[psi (Y - mu)/V] mu^(3/2) */
        double step = (sum / root - n * expected) * root / (n * information * mu * root);
        double previous = beta;
        beta += step;
        if (!isfinite(beta)) return 0;
        double size = previous * previous > 1e-10 ? previous * previous : 1e-10;
        if (step * step < 1e-6 * size) {
            if (fabs(beta) > 300) return 0;
            *mean = exp(beta);
            return 1;
        }
    }
    return 0;
}

/* E psi_c(a + t z) for a standard normal z */
static double clipped_normal(double a, double t, double c) {
    const double low = (-c - a) / t, high = (c - a) / t, root = 0.7071067811865476, norm = 0.3989422804014327;
    double below = 0.5 * erfc(-low * root), above = 0.5 * erfc(high * root);
    return c * (above - below) + a * (1 - above - below) +
           t * norm * (exp(-0.5 * low * low) - exp(-0.5 * high * high));
}

/* E psi_c of the Pearson residual of Poisson counts of mean mu with Gaussian noise added; s: its standard deviation */
static double noisy_expectation(double mu, double readout, double s, double tuning) {
    if (mu <= 0 || mu > 400) return 0; /* symmetric, or as good as that */
    double t = sqrt(readout) / s, reach = 8 * sqrt(mu) + 8, sum = 0;
    double first = floor(mu - reach), term;
    if (first < 0) first = 0;
    term = poisson(mu, first);
    for (double k = first; k <= mu + reach; k++) {
        sum += term * clipped_normal((k - mu) / s, t, tuning);
        term *= mu / (k + 1);
    }
    return sum;
}

static double noisy_score(const double *y, int n, double mu, double readout, double tuning) {
    double s = sqrt((mu > 0 ? mu : 0) + readout), sum = 0;
    /* a single photon is no outlier, however few there are: limiting its pull would cost half of what is known */
    double photon = (1 + 3 * sqrt(readout)) / s;
    if (tuning < photon) tuning = photon;
    for (int i = 0; i < n; i++) {
        double r = (y[i] - mu) / s;
        sum += r < -tuning ? -tuning : r > tuning ? tuning : r;
    }
    return sum - n * noisy_expectation(mu, readout, s, tuning);
}

/* Robust mean of Poisson counts with Gaussian noise of variance `readout` > 0. The score is positive at the smallest value
 * and negative at the largest, so that the root between them is always found (regula falsi, Illinois variant). */
static double robust_noisy_mean(const double *y, int n, double readout, double tuning) {
    double low = y[0], high = y[0];
    for (int i = 1; i < n; i++) {
        if (y[i] < low) low = y[i];
        if (y[i] > high) high = y[i];
    }
    if (!(high > low)) return low;
    double at_low = noisy_score(y, n, low, readout, tuning), at_high = noisy_score(y, n, high, readout, tuning);
    if (at_low <= 0) return low;
    if (at_high >= 0) return high;
    int side = 0;
    for (int iteration = 0; iteration < 200; iteration++) {
        double mu = (low * at_high - high * at_low) / (at_high - at_low);
        if (!(mu > low && mu < high)) mu = 0.5 * (low + high);
        double score = noisy_score(y, n, mu, readout, tuning);
        if (score > 0) {
            low = mu, at_low = score;
            if (side == 1) at_high *= 0.5;
            side = 1;
        } else {
            high = mu, at_high = score;
            if (side == -1) at_low *= 0.5;
            side = -1;
        }
        /* to a thousandth of the standard deviation of the mean */
        if (fabs(score) < 1e-3 * sqrt(n) || high - low < 1e-9 * (1 + fabs(mu))) return mu;
    }
    return 0.5 * (low + high);
}

int ssx_robust_poisson_mean(int64_t n, const double *y, double tuning, int max_iterations, double *scratch,
                            double *mean) {
    return robust_poisson_mean(y, (int)n, tuning, max_iterations, scratch, mean);
}

double ssx_robust_noisy_mean(int64_t n, const double *y, double readout, double tuning) {
    return robust_noisy_mean(y, (int)n, readout, tuning);
}

INLINED int fit_background(box_t *box, int method, double tuning, int min_pixels, double readout, double *scratch,
                          double *level) {
    int n = 0, size = box->nx * box->ny;
    uint8_t *restrict code = box->code;
    const double *restrict value = box->value;
    *level = 0;
    for (int i = 0; i < size; i++) {
        scratch[n] = value[i]; /* without a branch: overwritten unless it counts */
        n += (code[i] & (VALID | BACKGROUND)) == (VALID | BACKGROUND);
    }
    if (n < min_pixels) return 0;
    int negative = 0;
    double largest = 0;
    for (int i = 0; i < n; i++) {
        negative |= scratch[i] < 0;
        if (scratch[i] > largest) largest = scratch[i];
    }
    if (method == ROBUST_POISSON && (negative || readout > 0)) {
        *level = robust_noisy_mean(scratch, n, readout > 0 ? readout : NO_READOUT, tuning);
    } else if (method == ROBUST_POISSON) {
        /* Newton's method in the logarithm, as DIALS has it, where it comes to an end within the data */
        if (!robust_poisson_mean(scratch, n, tuning, 100, scratch + n, level) || *level > largest)
            *level = robust_noisy_mean(scratch, n, NO_READOUT, tuning);
    } else {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += scratch[i];
        *level = sum / n;
    }
    for (int i = 0; i < size; i++)
        code[i] |= (code[i] & (VALID | BACKGROUND)) == (VALID | BACKGROUND) ? BACKGROUND_USED : 0;
    return 1;
}

/* sums: intensity, its variance, background under the peak, its variance, level, x, y, variance of x, of y
 * counts: valid, foreground, background, background used. Returns the FAILED_ bits. */
INLINED int measure(const box_t *box, double level, double readout, double *sums, int32_t *counts) {
    double peak = 0, s = 0, s2 = 0, sx = 0, sy = 0, sxx = 0, syy = 0;
    int failed = 0, valid = 0, foreground = 0, outside = 0, used = 0;
    for (int j = 0; j < box->ny; j++) {
        const uint8_t *restrict code = box->code + (size_t)j * box->nx;
        const double *restrict value = box->value + (size_t)j * box->nx;
        int row = 0;
        for (int i = 0; i < box->nx; i++) {
            int counted = (code[i] & (FOREGROUND | VALID | BACKGROUND)) == (VALID | BACKGROUND);
            valid += code[i] & VALID;
            row |= code[i];
            outside += counted;
            used += counted & ((code[i] & BACKGROUND_USED) != 0);
        }
        if (!(row & FOREGROUND)) continue;
        for (int i = 0; i < box->nx; i++) {
            if (!(code[i] & FOREGROUND)) continue;
            if (!(code[i] & VALID)) {
                failed = FAILED_SUMMATION;
                continue;
            }
            double net = value[i] - level, x = i + 0.5, y = j + 0.5;
            peak += value[i];
            foreground++;
            if (net <= 0) continue;
            s += net;
            s2 += net * net;
            sx += net * x;
            sy += net * y;
            sxx += net * x * x;
            syy += net * y * y;
        }
    }
    counts[0] = valid, counts[1] = foreground, counts[2] = outside, counts[3] = used;
    double under = level * counts[1], ratio = counts[3] > 0 ? 1.0 + (double)counts[1] / counts[3] : 1.0;
    sums[0] = peak - under;
    sums[1] = fabs(sums[0]) + fabs(under) * ratio;
    sums[2] = under;
    sums[3] = fabs(under) * ratio;
    if (readout > 0) {
        sums[1] += counts[1] * readout * ratio;
        sums[3] += counts[1] * readout * (ratio - 1.0);
    }
    sums[4] = level;
    if (s > 0 && s * s > s2) {
        double x = sx / s, y = sy / s;
        /* unbiased variance of the mean, and the variance of a position within a pixel */
        sums[5] = box->x0 + x;
        sums[6] = box->y0 + y;
        sums[7] = (sxx - s * x * x) / (s * s - s2) + 1.0 / 12;
        sums[8] = (syy - s * y * y) / (s * s - s2) + 1.0 / 12;
    } else {
        failed |= FAILED_CENTROID;
        sums[5] = box->x0 + 0.5 * box->nx;
        sums[6] = box->y0 + 0.5 * box->ny;
        sums[7] = sums[8] = 0;
    }
    return failed;
}

/* scratch holds 4 doubles per pixel of the largest box, and as many for its two rows of corners */
static void lay_out(double *scratch, int64_t largest, box_t *box, double **row, double **sample) {
    box->value = scratch;
    *sample = scratch + largest;
    *row = scratch + 3 * largest;
    box->code = (uint8_t *)(scratch + 3 * largest + 4 * (largest + 2));
}

WIDE void ssx_integrate(int64_t n, const int32_t *bbox, const double *axes, const double *mean, const double *precision,
                   double limit, double radius, const void *frame, int is_float, const uint8_t *frame_mask, int height,
                   int width, const double *panel, double saturation, int method, double tuning, int min_pixels,
                   double readout, int64_t largest, double *scratch, double *sums, int32_t *counts, int32_t *failed) {
    box_t box;
    double *row, *sample, level;
    lay_out(scratch, largest, &box, &row, &sample);
    for (int64_t r = 0; r < n; r++) {
        cut_box(frame, is_float, frame_mask, height, width, bbox + 4 * r, &box);
        mark_ellipse(panel, axes + 6 * r, mean + 2 * r, precision + 3 * r, limit, radius, &box, row);
        failed[r] = fit_background(&box, method, tuning, min_pixels, readout, sample, &level) ? 0 : FAILED_BACKGROUND;
        failed[r] |= measure(&box, level, readout, sums + 9 * r, counts + 4 * r);
        int over = 0;
        for (int i = 0; i < box.nx * box.ny; i++) over |= box.value[i] > saturation;
        if (over) failed[r] |= OVERLOADED;
    }
}

/* Second moment about the predicted direction of the strong pixels of each spot, in radian^2; counts is their sum */
void ssx_angular_variance(int64_t n, const int32_t *bbox, const int64_t *offset, const uint8_t *strong, const double *s1,
                          const void *frame, int is_float, const uint8_t *frame_mask, int height, int width,
                          const double *panel, double *counts, double *variance) {
    (void)frame_mask; /* the spot finder took trusted pixels only */
    for (int64_t r = 0; r < n; r++) {
        const int32_t *b = bbox + 4 * r;
        const uint8_t *mask = strong + offset[r];
        double total = 0, moment = 0, lab[3];
        for (int y = b[2]; y < b[3]; y++) {
            for (int x = b[0]; x < b[1]; x++) {
                if (!*mask++ || x < 0 || y < 0 || x >= width || y >= height) continue;
                size_t at = (size_t)y * width + x;
                double value = is_float ? ((const double *)frame)[at] : ((const int32_t *)frame)[at];
                pixel_to_lab(panel, x + 0.5, y + 0.5, lab);
                double cosine = dot(lab, s1 + 3 * r) / sqrt(dot(lab, lab) * dot(s1 + 3 * r, s1 + 3 * r));
                double angle = acos(cosine > 1 ? 1 : cosine);
                total += value;
                moment += value * angle * angle;
            }
        }
        counts[r] = total;
        variance[r] = total > 1 ? moment / (total - 1) : 0;
    }
}

/* Strong spots: background and centroid within a circle, then the mean and covariance of the counts above the
 * background in the plane tangential to the Ewald sphere at that centroid.
 * direction: unit vector to the centroid; moments: total, mean e1, e2, covariance 11, 12, 22 */
WIDE void ssx_strong_spots(int64_t n, const int32_t *bbox, const double *axes, double inverse_variance, const int32_t *strong_bbox,
                      const int64_t *offset, const uint8_t *strong, const double *s0, const void *frame, int is_float,
                      const uint8_t *frame_mask, int height, int width, const double *panel, int method, double tuning,
                      int min_pixels, double readout, int64_t largest, double *scratch, double *sums, int32_t *counts, int32_t *failed,
                      double *direction, double *moments) {
    box_t box;
    double *row, *sample, level;
    const double centre[2] = {0, 0}, precision[3] = {inverse_variance, 0, inverse_variance};
    double radius = sqrt(dot(s0, s0));
    lay_out(scratch, largest, &box, &row, &sample);
    for (int64_t r = 0; r < n; r++) {
        cut_box(frame, is_float, frame_mask, height, width, bbox + 4 * r, &box);
        mark_ellipse(panel, axes + 6 * r, centre, precision, 1.0, 1.0, &box, row);
        const int32_t *b = strong_bbox + 4 * r;
        const uint8_t *mask = strong + offset[r];
        for (int y = b[2]; y < b[3]; y++) {
            for (int x = b[0]; x < b[1]; x++) {
                int i = x - box.x0, j = y - box.y0;
                if (*mask++ && i >= 0 && j >= 0 && i < box.nx && j < box.ny) box.code[j * box.nx + i] |= FOREGROUND;
            }
        }
        failed[r] = fit_background(&box, method, tuning, min_pixels, readout, sample, &level) ? 0 : FAILED_BACKGROUND;
        double *out = sums + 9 * r, *m = moments + 6 * r, *d = direction + 3 * r;
        failed[r] |= measure(&box, level, readout, out, counts + 4 * r);

        double lab[3], e1[3], e2[3];
        pixel_to_lab(panel, out[5], out[6], lab);
        double length = sqrt(dot(lab, lab));
        for (int k = 0; k < 3; k++) d[k] = lab[k] / length;
        e1[0] = d[1] * s0[2] - d[2] * s0[1], e1[1] = d[2] * s0[0] - d[0] * s0[2], e1[2] = d[0] * s0[1] - d[1] * s0[0];
        length = sqrt(dot(e1, e1));
        for (int k = 0; k < 3; k++) e1[k] /= length;
        e2[0] = d[1] * e1[2] - d[2] * e1[1], e2[1] = d[2] * e1[0] - d[0] * e1[2], e2[2] = d[0] * e1[1] - d[1] * e1[0];

        memset(m, 0, 6 * sizeof(double));
        for (int j = 0; j < box.ny; j++) {
            for (int i = 0; i < box.nx; i++) {
                double net = box.value[j * box.nx + i] - level;
                if ((box.code[j * box.nx + i] & (VALID | FOREGROUND)) != (VALID | FOREGROUND) || net <= 0) continue;
                pixel_to_lab(panel, box.x0 + i + 0.5, box.y0 + j + 0.5, lab);
                double scale = radius / sqrt(dot(lab, lab)), u = dot(e1, lab) * scale, v = dot(e2, lab) * scale;
                m[0] += net;
                m[1] += net * u;
                m[2] += net * v;
                m[3] += net * u * u;
                m[4] += net * u * v;
                m[5] += net * v * v;
            }
        }
        if (m[0] > 0) {
            for (int k = 1; k < 6; k++) m[k] /= m[0];
            m[3] -= m[1] * m[1];
            m[4] -= m[1] * m[2];
            m[5] -= m[2] * m[2];
        }
    }
}
