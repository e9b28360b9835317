// The two branches of a block in evaluation, on CPUs, for NHWC tensors, from the normalisation to the sum:
//
//   x + W2 (DWConv(h) * (Wv n + bv)) + b2   and   x + W2 (h + GELU(DWConv(h))) + b2,   h = GELU(W1 n + b1), n = norm(x)
//
// Of h there is never more than some channels of a band of rows, which stays in the second cache level.
#include "products.h"
#include <utility>

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
    vf d = LANES < (int)rest ? load(x + whole, rest) - mean : vf{};
    squares += d * d;
  }
  vf scale = all(1.f / __builtin_sqrtf(sum(squares) / channels + eps));
  for (long c = 0; c < whole; c += V) put(Kind{}, row, c, (load(x + c) - mean) * scale);
  if (rest) put(Kind{}, row, whole, LANES < (int)rest ? (load(x + whole, rest) - mean) * scale : vf{});
}

template <class Kind, class T, bool multiplied>
struct Branch {
  using Row = std::conditional_t<multiplied, Kind, Plain>;  // of h; for a 3x3 kernel pairs take longer to make than they save
  long images, height, width, channels, hidden, kernel;
  const T* x;
  float eps;
  T* out;
  const vf *w1 = nullptr, *b1 = nullptr, *wv = nullptr, *bv = nullptr;  // packed; wv and bv where DWConv(h) is multiplied
  const vf *taps = nullptr, *b_taps = nullptr;                          // [vector][ky][kx]
  const vf *w2 = nullptr, *b2 = nullptr;

  // All weights lie in a row
  void set(const vf* weights) {
    auto next = [&](long vectors) { return std::exchange(weights, weights + vectors); };
    w1 = next(inner() * depth()), b1 = next(inner());
    if (multiplied) wv = next(inner() * depth()), bv = next(inner());
    taps = next(inner() * kernel * kernel), b_taps = next(inner());
    w2 = next(outs() * words(Kind{}, inner() * V)), b2 = next(outs());
  }

  long pad() const { return kernel / 2; }
  long outs() const { return divided(channels, V); }
  long inner() const { return divided(hidden, V); }
  // Vectors of h at a time. Their share of the output is added up block by block, except behind the multiplication, where
  // the layer is as narrow as the output.
  long block() const { return multiplied ? PANEL : 4 * Kind::STEP; }
  long band() const {  // rows: a few hundred positions, more where a large kernel needs many rows around
    long bands = std::max<long>(1, height * width / (multiplied ? 448 : 224));
    return divided(height, std::min(bands, height));
  }
  long slots() const { return band() + 2 * pad(); }
  long line() const { return width + 2 * pad() + STRIP + 2; }
  long depth() const { return words(Kind{}, channels); }

  // What a task works on: rows [y, end) of an image, of which h is there up to `filled` and shall be up to `fresh`
  struct Band {
    long y, end, filled, fresh, first;  // `first`: the row at which the normalised rows begin
    bool starts;
  };
  struct Memory {
    vf *sums, *h, *kept, *row, *values, *filter;
    uint32_t *left, *middle;
  };

  Memory memory(long count) const {
    long positions = band() * width, wide = multiplied ? count : block();
    long sizes[] = {positions * outs(),         block() * slots() * line(), count * 2 * pad() * line(),
                    PANEL * width,              PANEL * positions,          kernel * kernel,
                    divided((slots() + pad()) * width * depth(), V) + 1,    divided(positions * words(Kind{}, wide * V), V) + 1};
    long total = 0;
    for (long size : sizes) total += size;
    vf *next = scratch(total), *at[8];
    for (int i = 0; i < 8; next += sizes[i++]) at[i] = next;
    std::memset((void*)at[1], 0, sizes[1] * sizeof(vf));  // the columns beside the map stay zero
    return {at[0], at[1], at[2], at[3], at[4], at[5], (uint32_t*)at[6], (uint32_t*)at[7]};
  }

  // Rows [from, to) of an image, with the hidden vectors [first, last): the output, or their share of it where a map for
  // the shares is given.
  void segment(long image, long from, long to, long first, long last, vf* share) const {
    Memory m = memory(last - first);
    const T* map = x + image * height * width * channels;
    Band b{};
    b.filled = std::max<long>(from - pad(), 0);
    long most = multiplied ? last - first : block(), step = words(Kind{}, most * V);
    for (b.y = from; b.y < to; b.y = b.end, b.filled = b.fresh) {
      b.end = std::min(b.y + band(), to), b.fresh = std::min(b.end + pad(), height), b.starts = b.y == from;
      b.first = multiplied ? std::min(b.y, b.filled) : b.filled;
      long positions = (b.end - b.y) * width, start = (image * height + b.y) * width;
      for (long i = b.first * width; i < b.fresh * width; i++) {
        __builtin_prefetch(map + (i + 16) * channels, 0, 2);
        normalise<Kind>(m.left + (i - b.first * width) * depth(), map + i * channels, channels, eps);
      }
      vf* sums = share ? share + start * outs() : m.sums;
      for (long v = first, done = 0; v < last; v += block()) {
        long n = std::min(block(), last - v);
        fill(b, m, v, n, m.kept + (v - first) * 2 * pad() * line());
        for (long i = 0; i < n; i += PANEL) {
          long some = std::min<long>(PANEL, n - i);
          if (multiplied)
            product<Kind>(positions, depth(), m.left + (b.y - b.first) * width * depth(), depth(), wv + (v + i) * depth(), 0,
                          depth(), some, m.values, 1, positions, false);
          for (long j = i; j < i + some; j++)
            convolve(b, m, v + j, m.h + j * slots() * line(), m.values + (j - i) * positions, step, done + j);
        }
        done += n;
        if (done < most && v + n < last) continue;
        product<Kind>(positions, words(Kind{}, done * V), m.middle, step, w2, words(Kind{}, (v + n - done) * V),
                      words(Kind{}, inner() * V), outs(), sums, outs(), 1, v + n - done > first);
        done = 0;
      }
      for (long i = 0; i < positions && !share; i++) put_out(start + i, sums + i * outs());
    }
  }

  // n vectors of h, from the one at v on, for the rows around a band. Those of them that the band before had are kept.
  void fill(const Band& b, const Memory& m, long v, long n, vf* kept) const {
    long slice = slots() * line(), again = 2 * pad() * line();
    for (long i = 0; i < n; i++) {
      vf* h = m.h + i * slice;
      if (!b.starts) std::memcpy((void*)h, kept + i * again, again * sizeof(vf));
      for (long y = b.y - pad(); y < b.end + pad(); y++)
        if (y < 0 || y >= height) std::memset((void*)(h + (y - b.y + pad()) * line()), 0, line() * sizeof(vf));
    }
    for (long i = 0; i < n; i += PANEL) {
      long some = std::min<long>(PANEL, n - i);
      for (long y = b.filled; y < b.fresh; y++) {
        product<Kind>(width, depth(), m.left + (y - b.first) * width * depth(), depth(), w1 + (v + i) * depth(), 0, depth(),
                      some, m.row, 1, width, false);
        for (long j = 0; j < some; j++) {
          vf *row = m.h + (i + j) * slice + (y - b.y + pad()) * line(), before{};
          for (long p = 0; p < width; p++) {
            vf now = gelu(m.row[j * width + p] + b1[v + i + j], x);
            Row::put(row, p + pad(), before, now);
            before = now;
          }
        }
      }
    }
    for (long i = 0; i < n; i++)
      std::memcpy((void*)(kept + i * again), m.h + i * slice + (b.end - b.y) * line(), again * sizeof(vf));
  }

  // What follows the convolution of one vector of channels, into a column of the last product's left matrix
  void convolve(const Band& b, const Memory& m, long v, const vf* h, const vf* values, long step, long column) const {
    const vf* filter = taps + v * kernel * kernel;
    if (Row::STEP > 1) {
      for (long i = 0; i < kernel * kernel; i++) m.filter[i] = Row::pack(filter[i], (i + 1) % kernel ? filter[i + 1] : vf{});
      filter = m.filter;
    }
    long strips = divided(width, STRIP);
    const vf *window[MOST], start = b_taps[v];
    for (long s = 0; s < strips; s++) {
      long from = width * s / strips, count = width * (s + 1) / strips - from;
      for (long y = 0; y < b.end - b.y; y++) {
        vf sums[STRIP];
        for (long i = 0; i < kernel; i++) window[i] = h + (y + i) * line();
        if constexpr (multiplied) {
          for (long i = 0; i < count; i++) sums[i] = start;
          slide_any<Row>((int)count, sums, window, kernel, from, filter, kernel);
        } else {
          nine_any((int)count, sums, window[0] + from, line(), filter, start);
        }
        for (long i = 0; i < count; i++) {
          long p = y * width + from + i;
          vf result = multiplied ? sums[i] * (values[p] + bv[v])
                                   : Row::first(window[pad()][from + i + pad()]) + gelu(sums[i], x);
          put(Kind{}, m.middle + p * step, column * V, result);
        }
      }
    }
  }

  // `slide` for a 3x3 kernel, which all in one piece takes half the time
  template <int N>
  static void nine(vf* sums, const vf* h, long line, const vf* filter, vf start) {
    vf s[N];
    for (int i = 0; i < N; i++) s[i] = start;
#pragma GCC unroll 3
    for (long ky = 0; ky < 3; ky++, h += line)
#pragma GCC unroll 3
      for (long kx = 0; kx < 3; kx++)
        for (int i = 0; i < N; i++) s[i] += h[kx + i] * filter[ky * 3 + kx];
    for (int i = 0; i < N; i++) sums[i] = s[i];
  }
  template <int N = STRIP>
  static inline void nine_any(int count, vf* sums, const vf* h, long line, const vf* filter, vf start) {
    if constexpr (N > 0) {
      if (count == N) return nine<N>(sums, h, line, filter, start);
      nine_any<N - 1>(count, sums, h, line, filter, start);
    }
  }

  void put_out(long position, const vf* sums) const {
    finish(out + position * channels, x + position * channels, sums, b2, outs(), channels);
  }

  // Images are dealt to threads. Where that leaves some idle, an image is cut into segments of rows if it has many of them
  // (the rows around are computed twice), and the hidden layer into parts, whose shares are added up at the end.
  int run(int threads) const {
    long positions = images * height * width, panels = divided(inner(), PANEL);
    bool uneven = images % threads && images < 4 * threads;
    long segments = uneven ? std::clamp<long>(height / (8 + 4 * pad()), 1, threads) : 1;
    long parts = uneven ? std::clamp<long>(divided(threads, images * segments), 1, panels) : 1, failed = 0;
    vf* shares = nullptr;
    if (parts > 1) {
      shares = (vf*)std::aligned_alloc(64, divided(parts * positions * outs() * sizeof(vf), 64) * 64);
      if (!shares) return 1;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(3) reduction(+ : failed)
    for (long image = 0; image < images; image++)
      for (long s = 0; s < segments; s++)
        for (long part = 0; part < parts; part++) try {
            segment(image, height * s / segments, height * (s + 1) / segments, panels * part / parts * PANEL,
                    std::min(panels * (part + 1) / parts * PANEL, inner()),
                    shares ? shares + part * positions * outs() : nullptr);
          } catch (const std::bad_alloc&) {
            failed++;
          }
    if (shares) {
#pragma omp parallel for num_threads(threads)
      for (long i = 0; i < positions; i++) {
        vf* total = shares + i * outs();
        for (long part = 1; part < parts; part++)
          for (long v = 0; v < outs(); v++) total[v] += total[part * positions * outs() + v];
        put_out(i, total);
      }
      std::free(shares);
    }
    return failed > 0;
  }
};

// Shape: images, height, width, channels, hidden channels of the MLP, kernel of the modulation, blocks. Of each block the
// packed weights of the one branch and of the other. `between` is as large as `out`.
extern "C" int conv2former_blocks(int half, const long* n, const void* x, float eps, const vf* const* weights, void* between,
                                  void* out, int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    for (long i = 0; i < n[6]; i++) {
      Branch<Kind, T, true> mod{n[0], n[1], n[2], n[3], n[3], n[5], (const T*)(i ? out : x), eps, (T*)between};
      Branch<Kind, T, false> mlp{n[0], n[1], n[2], n[3], n[4], 3, (const T*)between, eps, (T*)out};
      mod.set(weights[2 * i]), mlp.set(weights[2 * i + 1]);
      if (mod.run(threads) || mlp.run(threads)) return 1;
    }
    return 0;
  });
}

extern "C" int conv2former_pairs() { return PAIRS; }
extern "C" int conv2former_panel() { return PANEL * V; }
