/* Loops of the simulator: spots drawn on an image of expected counts, and counts drawn from it. */
#include "common.h"

#define N_NODES 3

static double normal_cdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }

/* Adds n spots to image (ny x nx, row-major). Each is a bivariate normal distribution of `total` counts with centre
   (cx, cy) in pixels, pixel (i, j) covering [i, i+1) x [j, j+1), and covariance (vxx, vxy, vyy) in pixels squared,
   integrated over each pixel: exactly along x (differences of the conditional distribution function at given y), by
   Gauss-Legendre quadrature along y. Pixels beyond `reach` standard deviations are left alone. */
void ssx_add_spots(float *image, int64_t ny, int64_t nx, const double *centre, const double *covariance,
                   const double *total, int64_t n, double reach) {
    static const double node[N_NODES] = {0.11270166537925831148, 0.5, 0.88729833462074168852};
    static const double weight[N_NODES] = {5.0 / 18.0, 8.0 / 18.0, 5.0 / 18.0};
    const double inv_sqrt_2pi = 0.39894228040143267794;

    for (int64_t k = 0; k < n; k++) {
        const double cx = centre[2 * k], cy = centre[2 * k + 1];
        const double vxx = covariance[3 * k], vxy = covariance[3 * k + 1], vyy = covariance[3 * k + 2];
        const double sx = sqrt(vxx), sy = sqrt(vyy);
        const double slope = vxy / vyy;                    /* of the mean of x at given y */
        const double s_cond = sqrt(vxx - vxy * slope);     /* and its standard deviation */
        int64_t x0 = (int64_t)floor(cx - reach * sx), x1 = (int64_t)ceil(cx + reach * sx);
        int64_t y0 = (int64_t)floor(cy - reach * sy), y1 = (int64_t)ceil(cy + reach * sy);
        if (x0 < 0) x0 = 0;
        if (y0 < 0) y0 = 0;
        if (x1 > nx) x1 = nx;
        if (y1 > ny) y1 = ny;
        for (int64_t y = y0; y < y1; y++) {
            float *row = image + y * nx;
            for (int g = 0; g < N_NODES; g++) {
                const double dy = (double)y + node[g] - cy;
                const double density = total[k] * weight[g] * inv_sqrt_2pi / sy * exp(-0.5 * dy * dy / vyy);
                const double mean = cx + slope * dy;
                double below = normal_cdf(((double)x0 - mean) / s_cond);
                for (int64_t x = x0; x < x1; x++) {
                    const double upto = normal_cdf(((double)(x + 1) - mean) / s_cond);
                    row[x] += (float)(density * (upto - below));
                    below = upto;
                }
            }
        }
    }
}

/* The i-th number of the stream `key`: the output function of SplitMix64 (Steele, Lea, Flood 2014) on a Weyl sequence,
   so that any element can be had without the ones before it. */
static uint64_t random_word(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

/* Poisson counts of the n expectations, by inversion of the distribution function with the i-th number of stream `key`
   for element i. Expectations above `limit`, where the search gets long and exp(-mean) small, are left to the caller:
   their count is set to -1. Returns how many these are. */
int64_t ssx_poisson(const float *expected, int64_t n, uint64_t key, double limit, int32_t *counts) {
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
        const double mean = expected[i];
        if (mean > limit) {
            counts[i] = -1;
            left++;
            continue;
        }
        double u = (double)(random_word(key, (uint64_t)i) >> 11) * 0x1p-53;
        double p = exp(-mean);
        int32_t k = 0;
        while (u >= p && k < 1000) {
            u -= p;
            k++;
            p *= mean / k;
        }
        counts[i] = k;
    }
    return left;
}
