// Products of a few positions with a matrix, whose weights come packed: panels of two vectors of outputs (the last may have
// one), in each panel one input, or a pair of bfloat16 inputs, after the other. A tile of TILE positions times a panel stays
// in registers.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__)
constexpr int TILE = 14;  // times two vectors: with a panel's row and one input, 31 of 32 registers
#elif defined(__AVX2__)
constexpr int TILE = 6;
#else
constexpr int TILE = 12;
#endif
constexpr int PANEL = 2;

// ---- less than a vector, at the end of the channels

// x in the first n lanes, zero in the others
static inline vf first_of(vf x, long n) {
  vi lane;
  for (int i = 0; i < V; i++) lane[i] = i;
  return lane < (int)n ? x : vf{};
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline vf load(const float* p, long n) { return (vf)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
static inline vf load(const bfloat16* p, long n) {
  vh bits = (vh)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
  return as_float(__builtin_convertvector(bits, vu) << 16);
}
static inline void store(float* p, vf x, long n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x); }
static inline void store(bfloat16* p, vf x, long n) {
  bfloat16 whole[V];
  store(whole, x);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, _mm256_loadu_si256((const __m256i*)whole));
}
#else
template <class T>
static inline vf load(const T* p, long n) {
  T whole[V] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
static inline void store(T* p, vf x, long n) {
  T whole[V];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}
#endif

static inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < V; i++) total += x[i];
  return total;
#endif
}

static constexpr long divided(long n, long by) { return (n + by - 1) / by; }

// ---- products

// Where some vectors of outputs of a packed matrix lie: they are all of a panel, or one of its two, `stride` vectors apart
struct Panel {
  const vf* weights;
  long stride;
};
// The panel of vector v, of a packed matrix with `vectors` of them and `depth` inputs
static inline Panel panel(const vf* packed, long v, long vectors, long depth) {
  long begin = v / PANEL * PANEL;
  return {packed + begin * depth + v % PANEL, std::min<long>(PANEL, vectors - begin)};
}
// How many vectors from v on lie in one panel and before `last`
static inline long together(long v, long last) { return std::min(v / PANEL * PANEL + PANEL, last) - v; }

// M positions times N vectors of outputs. `a` holds words, each a float or a pair of bfloat16. What lies `ahead` is asked
// for meanwhile: the next panel, which otherwise comes from memory no faster than the processor foresees.
template <class Kind, int M, int N>
static void tile(long steps, const uint32_t* a, long a_row, const vf* b, long stride, const vf* ahead, vf* c, long c_row,
                 long c_vector, bool add) {
  vf s[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) s[i][j] = add ? c[i * c_row + j * c_vector] : vf{};
  for (long k = 0; k < steps; k++, b += stride, ahead += stride) {
    __builtin_prefetch(ahead, 0, 2);
    if (N > 1 && V * sizeof(float) == 64) __builtin_prefetch(ahead + 1, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      vf word = as_float(vu{} + a[i * a_row + k]);
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) s[i][j] = Kind::tap(s[i][j], word, b[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) c[i * c_row + j * c_vector] = s[i][j];
}

template <class Kind, int N, int M = TILE>
static inline void tile_any(long rows, long steps, const uint32_t* a, long a_row, const vf* b, long stride, const vf* ahead,
                            vf* c, long c_row, long c_vector, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return tile<Kind, M, N>(steps, a, a_row, b, stride, ahead, c, c_row, c_vector, add);
    tile_any<Kind, N, M - 1>(rows, steps, a, a_row, b, stride, ahead, c, c_row, c_vector, add);
  }
}

// c (rows, n vectors) = or += a (rows, steps) times inputs of a panel
template <class Kind>
static void product(long rows, long steps, const uint32_t* a, long a_row, Panel b, long n, const vf* ahead, vf* c, long c_row,
                    long c_vector, bool add) {
  long tiles = divided(rows, TILE);
  for (long t = 0; t < tiles; t++) {
    long from = rows * t / tiles, count = rows * (t + 1) / tiles - from;
    const vf* next = t ? b.weights : ahead;
    if (n == PANEL)
      tile_any<Kind, PANEL>(count, steps, a + from * a_row, a_row, b.weights, b.stride, next, c + from * c_row, c_row, c_vector,
                            add);
    else
      tile_any<Kind, 1>(count, steps, a + from * a_row, a_row, b.weights, b.stride, next, c + from * c_row, c_row, c_vector, add);
  }
}

// c (rows, vectors) = or += a (rows, steps) times the inputs from `skip` on of a packed matrix that has `depth` of them
template <class Kind>
static void product(long rows, long steps, const uint32_t* a, long a_row, const vf* b, long skip, long depth, long vectors,
                    vf* c, long c_row, long c_vector, bool add) {
  const vf* after = b + (skip + steps) * std::min<long>(PANEL, vectors);
  for (long v = 0; v < vectors; v += PANEL) {
    Panel here = panel(b, v, vectors, depth);
    here.weights += skip * here.stride;
    const vf* ahead = v + PANEL < vectors ? here.weights + PANEL * depth : after;
    product<Kind>(rows, steps, a, a_row, here, together(v, vectors), ahead, c + v * c_vector, c_row, c_vector, add);
  }
}

// A row of the left matrix, with a vector of what follows behind it: floats, or bfloat16 of which a product takes pairs
static inline void put(Plain, uint32_t* row, long c, vf x) { store((float*)row + c, x); }
#if PAIRS
static inline void put(Paired, uint32_t* row, long c, vf x) { store((bfloat16*)row + c, x); }
#endif
static constexpr long words(Plain, long channels) { return channels; }
#if PAIRS
static constexpr long words(Paired, long channels) { return divided(channels, 2); }
#endif

// One position's channels, normalised, into a row of a left matrix
template <class Kind, class T>
static inline void normalise(uint32_t* row, const T* x, long channels, float eps) {
  long whole = channels / V * V, rest = channels - whole;
  vf total = rest ? load(x + whole, rest) : vf{}, squares{};
  for (long c = 0; c < whole; c += V) total += load(x + c);
  vf mean = all(sum(total) / channels);
  for (long c = 0; c < whole; c += V) {
    vf d = load(x + c) - mean;
    squares += d * d;
  }
  if (rest) {
    vf d = first_of(load(x + whole, rest) - mean, rest);
    squares += d * d;
  }
  vf scale = all(1.f / __builtin_sqrtf(sum(squares) / channels + eps));
  for (long c = 0; c < whole; c += V) put(Kind{}, row, c, (load(x + c) - mean) * scale);
  if (rest) put(Kind{}, row, whole, first_of((load(x + whole, rest) - mean) * scale, rest));
}

template <class T>
static inline vf load_up_to(const T* p, long n) {
  return n >= V ? load(p) : load(p, n);
}

// out = sums + bias (+ residual), for the channels from c on
template <class T>
static inline void finish(T* out, const T* residual, const vf* sums, const vf* bias, long vectors, long channels) {
  for (long v = 0; v < vectors; v++) {
    long n = channels - v * V;
    vf y = sums[v] + bias[v];
    if (residual) y += load_up_to(residual + v * V, n);
    n >= V ? store(out + v * V, y) : store(out + v * V, y, n);
  }
}
