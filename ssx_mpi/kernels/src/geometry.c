#include "common.h"

/* Loops of the joint refinement of a detector and many crystals; the equations stand in detector_refinement.py.
 * Spots come crystal by crystal: those of crystal k are starts[k] to starts[k + 1]. Every spot belongs to one node of
 * each of n_levels levels. */

static void cross_product(const double *a, const double *b, double *out) {
    out[0] = a[1] * b[2] - a[2] * b[1];
    out[1] = a[2] * b[0] - a[0] * b[2];
    out[2] = a[0] * b[1] - a[1] * b[0];
}

/* Derivatives of the position of each spot by the motions of its nodes, g (n, 2, 6 n_levels): node (n, n_levels) are
 * rows of axes (nodes, 3, 3), whose columns are fast, slow and normal, and of centre (nodes, 3). */
void ssx_detector_columns(int64_t n, int n_levels, const double *d_inverse, const double *s1, const double *xy,
                          const int64_t *node, const double *axes, const double *centre, double *g) {
    const int width = 6 * n_levels;
    for (int64_t i = 0; i < n; i++) {
        const double *e = d_inverse + 9 * i, *s = s1 + 3 * i;
        const double ahead = e[6] * s[0] + e[7] * s[1] + e[8] * s[2];
        double towards[2][3];
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < 3; k++) towards[r][k] = e[3 * r + k] - xy[2 * i + r] * e[6 + k];
        for (int l = 0; l < n_levels; l++) {
            const double *f = axes + 9 * node[i * n_levels + l], *c = centre + 3 * node[i * n_levels + l];
            const double arm[3] = {s[0] / ahead - c[0], s[1] / ahead - c[1], s[2] / ahead - c[2]};
            for (int k = 0; k < 3; k++) {
                const double axis[3] = {f[k], f[3 + k], f[6 + k]};
                double turned[3];
                cross_product(axis, arm, turned);
                for (int r = 0; r < 2; r++) {
                    double *out = g + (2 * i + r) * width + 6 * l + k;
                    out[0] = -(towards[r][0] * axis[0] + towards[r][1] * axis[1] + towards[r][2] * axis[2]);
                    out[3] = -(towards[r][0] * turned[0] + towards[r][1] * turned[1] + towards[r][2] * turned[2]);
                }
            }
        }
    }
}

/* N_kk (n_crystals, p, p) and b_k (n_crystals, p) of crystals with the derivatives c (n, 3, p), residuals r (n, 3) and
 * roots of weights w (n, 3). */
void ssx_crystal_normals(int64_t n_crystals, const int64_t *starts, int p, const double *c, const double *r,
                         const double *w, double *normal, double *right) {
    memset(normal, 0, sizeof(double) * (size_t)(n_crystals * p * p));
    memset(right, 0, sizeof(double) * (size_t)(n_crystals * p));
    for (int64_t k = 0; k < n_crystals; k++) {
        double *matrix = normal + k * p * p, *side = right + k * p;
        for (int64_t row = 3 * starts[k]; row < 3 * starts[k + 1]; row++) {
            const double *d = c + row * p, square = w[row] * w[row];
            for (int a = 0; a < p; a++) {
                const double weighted = square * d[a];
                side[a] += weighted * r[row];
                for (int b = 0; b <= a; b++) matrix[a * p + b] += weighted * d[b];
            }
        }
        for (int a = 0; a < p; a++)
            for (int b = a + 1; b < p; b++) matrix[a * p + b] = matrix[b * p + a];
    }
}

/* Adds to full (m, m), of which the lower triangle is left alone, to side (m) and to along (m) what the crystals from
 * `first` to `last` bring: N_gg - sum N_gk N_kk^-1 N_kg, b_g - sum N_gk N_kk^-1 b_k and sum N_gk y_k.
 * place (n, n_levels): first parameter of each node of a spot. root (K, p, p): R with R^T R = N_kk^-1. reduced (K, p):
 * R b_k. y (K, p). slot: m / 6 entries of -1, which it is again at the end; cross, half: p m entries each. */
WIDE void ssx_reduced_normals(int64_t first, int64_t last, const int64_t *starts, int n_levels, int p, int64_t m,
                         const double *g, const double *c, const double *r, const double *w, const int64_t *place,
                         const double *root, const double *reduced, const double *y, double *full, double *side,
                         double *along, int64_t *slot, int64_t *found, double *cross, double *half) {
    const int width = 6 * n_levels;
    for (int64_t k = first; k < last; k++) {
        int64_t n_found = 0;
        for (int64_t i = starts[k]; i < starts[k + 1]; i++)
            for (int l = 0; l < n_levels; l++) {
                const int64_t at = place[i * n_levels + l];
                if (slot[at / 6] < 0) {
                    slot[at / 6] = n_found;
                    found[n_found++] = at;
                }
            }
        const int64_t columns = 6 * n_found;
        memset(cross, 0, sizeof(double) * (size_t)(p * columns));
        for (int64_t i = starts[k]; i < starts[k + 1]; i++)
            for (int row = 0; row < 2; row++) {
                const double *own = g + (2 * i + row) * width, *d = c + (3 * i + row) * p;
                const double square = w[3 * i + row] * w[3 * i + row];
                if (square == 0) continue;
                for (int l = 0; l < n_levels; l++) {
                    const int64_t at = place[i * n_levels + l], to = 6 * slot[at / 6];
                    for (int a = 0; a < 6; a++) {
                        const double weighted = square * own[6 * l + a];
                        side[at + a] += weighted * r[3 * i + row];
                        for (int q = 0; q < p; q++) cross[q * columns + to + a] += weighted * d[q];
                        for (int other = l; other < n_levels; other++) {
                            double *out = full + (at + a) * m + place[i * n_levels + other];
                            for (int b = 0; b < 6; b++) out[b] += weighted * own[6 * other + b];
                        }
                    }
                }
            }
        const double *factor = root + k * p * p;
        for (int q = 0; q < p; q++) {
            double *out = half + q * columns;
            memset(out, 0, sizeof(double) * (size_t)columns);
            for (int s = 0; s < p; s++) {
                const double f = factor[q * p + s], *in = cross + s * columns;
                for (int64_t j = 0; j < columns; j++) out[j] += f * in[j];
            }
        }
        for (int64_t u = 0; u < n_found; u++)
            for (int a = 0; a < 6; a++) {
                const int64_t from = 6 * u + a;
                double to_side = 0, to_along = 0;
                for (int q = 0; q < p; q++) {
                    to_side += half[q * columns + from] * reduced[k * p + q];
                    to_along += cross[q * columns + from] * y[k * p + q];
                }
                side[found[u] + a] -= to_side;
                along[found[u] + a] += to_along;
                for (int64_t v = 0; v < n_found; v++) {
                    if (found[v] < found[u]) continue;
                    double sum[6] = {0};
                    for (int q = 0; q < p; q++) {
                        const double h = half[q * columns + from], *in = half + q * columns + 6 * v;
                        for (int b = 0; b < 6; b++) sum[b] += h * in[b];
                    }
                    double *out = full + (found[u] + a) * m + found[v];
                    for (int b = 0; b < 6; b++) out[b] -= sum[b];
                }
            }
        for (int64_t u = 0; u < n_found; u++) slot[found[u] / 6] = -1;
    }
}
