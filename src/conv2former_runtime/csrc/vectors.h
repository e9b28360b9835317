// Vectors of V floats by the compiler's extensions, so that one source serves AVX-512, AVX2 and NEON; GELU on them; and the
// two kinds of numbers that products multiply.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

#if defined(__AVX512F__)
constexpr int V = 16, STRIP = 14;  // lanes; accumulators that fit the registers beside a weight
#elif defined(__AVX2__)
constexpr int V = 8, STRIP = 12;
#else
constexpr int V = 4, STRIP = 14;
#endif
constexpr int MOST = 21;  // the largest kernel
constexpr int BAND = 8;  // rows of the map that are worked on together, so that a strip of them stays in the first cache

typedef float vf __attribute__((vector_size(V * 4)));
typedef int32_t vi __attribute__((vector_size(V * 4)));
typedef uint32_t vu __attribute__((vector_size(V * 4)));
typedef uint16_t vh __attribute__((vector_size(V * 2)));
typedef vf vf_loose __attribute__((aligned(4), may_alias));
typedef vh vh_loose __attribute__((aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

static inline vf all(float x) { return vf{} + x; }
static inline vf as_float(vu x) { return (vf)x; }

static inline vf load(const float* p) { return *(const vf_loose*)p; }
static inline vf load(const bfloat16* p) { return as_float(__builtin_convertvector(*(const vh_loose*)p, vu) << 16); }

static inline void store(float* p, vf x) { *(vf_loose*)p = x; }
static inline void store(bfloat16* p, vf x) {
#if PAIRS
  *(vh_loose*)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu b = (vu)x;
  vu rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  vu nan = (vu)(x != x);
  *(vh_loose*)p = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
#endif
}

// the smaller and the larger of both; b where it is NaN
#if defined(__AVX512F__)
static inline vf least(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf most(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline vf least(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf most(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline vf least(vf a, vf b) { return a < b ? a : b; }
static inline vf most(vf a, vf b) { return a > b ? a : b; }
#endif
static inline vf magnitude(vf x) { return as_float((vu)x & 0x7fffffff); }

// 2^x for -126 <= x <= 0: of the distance to the nearest whole number by a polynomial, fitted by weighted least squares to
// the smallest largest relative error, 8e-8
static inline vf power_of_two(vf x) {
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
  const vf shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x + shift) - shift;
#endif
  vf r = x - n;
  vf p = ((((1.32764717e-3f * r + 9.67554154e-3f) * r + 5.55071328e-2f) * r + 0.240221197f) * r + 0.693146967f) * r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return as_float((vu)(__builtin_convertvector(n, vi) << 23) + (vu)p);
#endif
}

// x times the normal distribution, which minus one half is an odd function: z P(z^2) / Q(z^2), fitted to the smallest largest
// error, 6e-8, under the condition that it is one half at 5.4, where x is cut (and a rounding error more, so that the
// distribution is 0 below -5.4). Over all x it errs as much as PyTorch's GELU.
static inline vf gelu(vf x, const float*) {
  vf z = least(all(5.4f), most(all(-5.4f), x)), s = z * z;
  vf p = ((((((-4.3335034e-12f * s + 7.47614095e-10f) * s - 5.65824165e-8f) * s + 2.424094e-6f) * s - 4.92305108e-5f) * s +
           3.1928392e-3f) * s + 1.23522952e-2f) * s + 0.398942501f;
  vf q = ((5.72392449e-4f * s + 1.59364317e-2f) * s + 0.197632555f) * s + 1.f;
  return x * most(all(0.f), z * (p / q) + 0.5f);
}

// For bfloat16: an odd polynomial for the distribution minus one half, fitted by least squares under the condition that it
// is one half at 4, where x is cut (and a rounding error more, so that the distribution is 0 below -4). Absolute error 3e-5;
// half a unit of bfloat16's last place is 2e-3 at 1.
static inline vf gelu(vf x, const bfloat16*) {
  vf z = least(all(4.f), most(all(-4.f), x)), s = z * z;
  vf p = ((((((-1.2950092e-9f * s + 1.0545058e-7f) * s - 3.7333477e-6f) * s + 7.6472686e-5f) * s - 1.0228294e-3f) * s +
           9.5870988e-3f) * s - 6.6072024e-2f) * s + 0.3988088f;
  return x * most(all(0.f), z * p + 0.5f);
}

// The distribution's tail beyond z = |x| is exp(-z^2 / 2) times a polynomial in 1 / (1 + 0.275 z), fitted by weighted least
// squares: z times its error is below 1e-8.
static inline vf gelu_slope(vf x) {
  vf z = least(all(13.f), magnitude(x)), bell = power_of_two(z * z * -0.72134752f), t = 1.f / (1.f + 0.275f * z);
  vf tail = bell * t *
            (((((-0.11362737f * t + 0.44706225f) * t - 0.32313257f) * t + 0.32772043f) * t + 0.044547006f) * t + 0.1174303f);
  vf slope = tail - z * bell * 0.39894228f;  // at -z; it is one minus this at z
  return x < 0.f ? slope : 1.f - slope;
}

// ---- rows in scratch memory: one vector of 4 V bytes a position, `Plain` floats or `Paired` bfloat16 neighbours

struct Plain {
  static constexpr int STEP = 1;
  static inline void put(vf* row, long i, vf, vf now) { row[i] = now; }
  static inline vf first(vf x) { return x; }
  // one rounding in every tile: left to the compiler, a tile of one vector was multiplied first and added then
  static inline vf tap(vf sum, vf x, vf w) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return sum + x * w;
#endif
  }
  static inline vf pack(vf x, vf) { return x; }
};

#if PAIRS
struct Paired {
  static constexpr int STEP = 2;
  static inline vf pack(vf low, vf high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  static inline void put(vf* row, long i, vf before, vf now) {
    if (i > 0) row[i - 1] = pack(before, now);
    row[i] = pack(now, vf{});
  }
  static inline vf first(vf x) { return as_float((vu)x << 16); }
  static inline vf tap(vf sum, vf x, vf w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// sums[t] += sum over rows r and i < n of rows[r][from + t + i] * factors[r * n + i]. The convolution is this with t for
// columns and i for taps, over all kernel rows; the gradient of its weights with t for taps and i for columns, row by row.
template <class Kind, int T>
static void slide(vf* sums, const vf* const* rows, long count, long from, const vf* factors, long n) {
  vf s[T];
  for (int t = 0; t < T; t++) s[t] = sums[t];
  for (long r = 0; r < count; r++) {
    const vf *x = rows[r] + from, *w = factors + r * n;
    for (long i = 0; i < n; i += Kind::STEP)
      for (int t = 0; t < T; t++) s[t] = Kind::tap(s[t], x[i + t], w[i]);
  }
  for (int t = 0; t < T; t++) sums[t] = s[t];
}

// From a number of sums to the code that keeps so many in registers
template <class Kind, int T = STRIP>
static inline void slide_any(int width, vf* sums, const vf* const* rows, long count, long from, const vf* factors, long n) {
  if constexpr (T > 0) {
    if (width == T) return slide<Kind, T>(sums, rows, count, from, factors, n);
    slide_any<Kind, T - 1>(width, sums, rows, count, from, factors, n);
  }
}

// Memory of a thread that stays for its next task
static vf* scratch(long vectors) {
  struct Memory {
    void* start = nullptr;
    long size = 0;
    ~Memory() { std::free(start); }
  };
  static thread_local Memory memory;
  if (memory.size < vectors) {
    std::free(memory.start);
    memory.start = std::aligned_alloc(64, (vectors * sizeof(vf) + 63) / 64 * 64);
    memory.size = memory.start ? vectors : 0;
    if (!memory.start) throw std::bad_alloc();
  }
  return (vf*)memory.start;
}

#if PAIRS
typedef Paired Half;
#else
typedef Plain Half;
#endif

// The kind and the element type that go with `half`; both branches of a call are the same but for these
template <class Act>
static int by_type(int half, Act act) {
  return half ? act(Half{}, bfloat16{}) : act(Plain{}, float{});
}
