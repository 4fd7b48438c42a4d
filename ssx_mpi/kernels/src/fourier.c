#include "common.h"

/* A minimum or maximum is kept in this many parts: one alone would wait for itself at every spot. */
#define LANES 16

/* Projections of n scattering vectors, given as three rows x, y, z, on one direction; without fused multiplications, so
 * that every machine puts a spot into the same bin. */
static inline void project(const double *q, int64_t n, const double *direction, double *p) {
    const double a = direction[0], b = direction[1], c = direction[2];
    for (int64_t j = 0; j < n; j++) p[j] = q[j] * a + q[n + j] * b + q[2 * n + j] * c;
}

/* Smallest and largest projection of n scattering vectors (3, n) on each direction; work: n doubles. */
WIDE void ssx_projection_limits(const double *q, int64_t n, const double *directions, int64_t n_directions, double *work,
                                double *low, double *high) {
    for (int64_t d = 0; d < n_directions; d++) {
        project(q, n, directions + 3 * d, work);
        double smallest[LANES], largest[LANES];
        for (int k = 0; k < LANES; k++) smallest[k] = largest[k] = work[0];
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES)
            for (int k = 0; k < LANES; k++) {
                smallest[k] = work[j + k] < smallest[k] ? work[j + k] : smallest[k];
                largest[k] = work[j + k] > largest[k] ? work[j + k] : largest[k];
            }
        for (; j < n; j++) {
            smallest[0] = work[j] < smallest[0] ? work[j] : smallest[0];
            largest[0] = work[j] > largest[0] ? work[j] : largest[0];
        }
        low[d] = smallest[0];
        high[d] = largest[0];
        for (int k = 1; k < LANES; k++) {
            low[d] = smallest[k] < low[d] ? smallest[k] : low[d];
            high[d] = largest[k] > high[d] ? largest[k] : high[d];
        }
    }
}

/* Histograms (n_directions, n_bins) of the projections: bin k is about low + k (high - low) / (n_bins - 1). */
WIDE void ssx_projection_histograms(const double *q, int64_t n, const double *directions, int64_t n_directions,
                                    const double *low, const double *high, int n_bins, double *work,
                                    float *histograms) {
    memset(histograms, 0, (size_t)n_directions * n_bins * sizeof(float));
    for (int64_t d = 0; d < n_directions; d++) {
        project(q, n, directions + 3 * d, work);
        const double scale = (n_bins - 1) / (high[d] - low[d]), first = low[d];
        float *bins = histograms + d * n_bins;
        if (!(high[d] > first)) { /* all in one place */
            bins[0] = (float)n;
            continue;
        }
        for (int64_t j = 0; j < n; j++) work[j] = (work[j] - first) * scale + 0.5;
        for (int64_t j = 0; j < n; j++) bins[(int)work[j]] += 1.0f;
    }
}

/* For each row of a complex spectrum (re, im interleaved) the largest modulus from element `from` on, the first of
 * equals, and its number. */
WIDE void ssx_largest_modulus(const float *spectra, int64_t n_rows, int64_t n_columns, int64_t from, float *work,
                              float *modulus, int32_t *at) {
    for (int64_t i = 0; i < n_rows; i++) {
        const float *z = spectra + 2 * n_columns * i;
        for (int64_t k = from; k < n_columns; k++) work[k] = z[2 * k] * z[2 * k] + z[2 * k + 1] * z[2 * k + 1];
        float lane[LANES] = {0}, largest = 0.0f;
        int64_t k = from;
        for (; k + LANES <= n_columns; k += LANES)
            for (int l = 0; l < LANES; l++) lane[l] = work[k + l] > lane[l] ? work[k + l] : lane[l];
        for (; k < n_columns; k++) largest = work[k] > largest ? work[k] : largest;
        for (int l = 0; l < LANES; l++) largest = lane[l] > largest ? lane[l] : largest;
        k = from;
        while (k < n_columns - 1 && work[k] != largest) k++;
        modulus[i] = sqrtf(largest);
        at[i] = (int32_t)k;
    }
}
