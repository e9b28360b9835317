// The two branches of a block in evaluation, on CPUs, for NHWC tensors, from the normalisation to the sum:
//
//   x + W2 (DWConv(h) * (Wv n + bv)) + b2   and   x + W2 (h + GELU(DWConv(h))) + b2,   h = GELU(W1 n + b1), n = norm(x)
//
// Of h a thread has some channels of a band of rows at a time, which stay in the second cache level; where all threads share
// an image, those of a larger part of it.
#include "products.h"
#include <array>
#include <numeric>
#include <utility>

// by OpenMP's library; its header is not with every compiler
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

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
  long depth() const { return words(Kind{}, channels); }
  long left_row() const { return words(Kind{}, outs() * V); }  // whole vectors, since several threads write them
  long slots() const { return rows + 2 * pad(); }
  // Rows that are multiplied together: as many as make whole tiles, up to 448 positions
  long lines() const { return std::clamp<long>(448 / width, 1, TILE / std::gcd(width, (long)TILE)); }
  long line() const { return width + 2 * pad() + STRIP + 2; }

  // Positions that all threads work on together, about; each has memory for a few vectors at all of them
  static constexpr long MOST_TOGETHER = 16384;

  // How it is worked on, see `run`: rows in a band, vectors of h at a time
  long rows = 0, block = 0;

  // What a task works on: rows [y, end) of an image, of which h is there up to `filled` and shall be up to `fresh`
  struct Band {
    long y, end, filled, fresh, first;  // `first`: the row at which the normalised rows begin
    bool starts, ends;
  };
  struct Memory {
    vf *sums, *h, *kept, *row, *values, *filter;
    uint32_t *left, *middle;
  };

  // A thread's own, for so many vectors of sums at each position of a band and so many of h whose last rows are kept
  static constexpr int OWN = 6;
  std::array<long, OWN> own(long sums, long kept) const {
    return {sums * rows * width,     block * slots() * line(),  kept * 2 * pad() * line(),
            PANEL * lines() * width, PANEL * rows * width,      kernel * kernel};
  }
  long left_size() const { return divided((slots() + pad()) * width * left_row(), V); }
  long middle_size(long vectors) const { return divided(rows * width * words(Kind{}, vectors * V), V); }
  static long total(const std::array<long, OWN>& sizes) { return std::accumulate(sizes.begin(), sizes.end(), 0L); }
  static Memory place(vf* next, const std::array<long, OWN>& sizes, vf* left, vf* middle) {
    vf* at[OWN];
    for (int i = 0; i < OWN; next += sizes[i++]) at[i] = next;
    std::memset((void*)at[1], 0, sizes[1] * sizeof(vf));  // the columns beside the map stay zero
    return {at[0], at[1], at[2], at[3], at[4], at[5], (uint32_t*)left, (uint32_t*)middle};
  }

  // Rows [from, to) of an image, by one thread, band by band. The output is added up block by block of h, except behind the
  // multiplication, where the hidden layer is as narrow as the output.
  void segment(long image, long from, long to) const {
    long most = multiplied ? inner() : block, step = words(Kind{}, most * V), again = 2 * pad() * line();
    auto sizes = own(outs(), inner());
    vf* memory = scratch(total(sizes) + left_size() + middle_size(most));
    Memory m = place(memory + left_size() + middle_size(most), sizes, memory, memory + left_size());
    Band b{};
    b.filled = std::max<long>(from - pad(), 0);
    for (b.y = from; b.y < to; b.y = b.end, b.filled = b.fresh) {
      b.end = std::min(b.y + rows, to), b.fresh = std::min(b.end + pad(), height), b.starts = b.y == from, b.ends = b.end == to;
      b.first = multiplied ? std::min(b.y, b.filled) : b.filled;
      long positions = (b.end - b.y) * width, start = (image * height + b.y) * width;
      normalise_rows(image, b, m, b.first, b.fresh);
      for (long v = 0, done = 0; v < inner(); v += block) {
        long n = std::min(block, inner() - v);
        columns(b, m, v, n, m.kept + v * again, m.middle, step, done);
        done += n;
        if (done < most && v + n < inner()) continue;
        product<Kind>(positions, words(Kind{}, done * V), m.middle, step, w2, words(Kind{}, (v + n - done) * V),
                      words(Kind{}, inner() * V), outs(), m.sums, outs(), 1, v + n - done > 0);
        done = 0;
      }
      for (long i = 0; i < positions; i++) put_out(start + i, m.sums + i * outs(), 0, outs());
    }
  }

  // Rows [from, to) of an image by all threads of a team: each normalises some of them, and of those around, then computes
  // some vectors of h and what follows them, then some of the output.
  void share(long image, long from, long to, const Memory& m, long member, long members) const {
    long count = to - from, positions = count * width, start = (image * height + from) * width;
    long step = words(Kind{}, inner() * V);
    Band b{from, to, 0, 0, std::max<long>(from - pad(), 0), true, true};
    long around = std::min(to + pad(), height) - b.first;
    normalise_rows(image, b, m, b.first + around * member / members, b.first + around * (member + 1) / members);
#pragma omp barrier
    // of all pairs of a vector and a row everybody has as many; the first and the last vector may be there in part
    long begin = inner() * count * member / members, end = inner() * count * (member + 1) / members;
    for (long v = begin / count, n; v * count < end; v += n) {
      long first = std::max<long>(begin - v * count, 0), last = std::min(end - v * count, count);
      b.y = from + first, b.end = from + last;
      b.filled = std::max<long>(b.y - pad(), 0), b.fresh = std::min(b.end + pad(), height);
      n = first > 0 ? 1 : together(v, std::max(end / count, v + 1));
      columns(b, m, v, n, nullptr, m.middle + first * width * step, step, v);
    }
#pragma omp barrier
    for (long v = 0; v < outs(); v += PANEL) {
      long n = together(v, outs());
      auto limit = [&](long i) {  // of all pairs of a vector and a position everybody has as many
        return std::clamp<long>((outs() * positions * i / members - v * positions) / n, 0, positions);
      };
      long first = limit(member), last = limit(member + 1);
      if (first == last) continue;
      Panel weights = panel(w2, v, outs(), step);
      product<Kind>(last - first, step, m.middle + first * step, step, weights, n, weights.weights + PANEL * step, m.sums, n, 1,
                    false);
      for (long i = first; i < last; i++) put_out(start + i, m.sums + (i - first) * n, v, n);
    }
  }

  void normalise_rows(long image, const Band& b, const Memory& m, long from, long to) const {
    const T* map = x + image * height * width * channels;
    for (long i = from * width; i < to * width; i++) {
      __builtin_prefetch(map + (i + 16) * channels, 0, 2);
      normalise<Kind>(m.left + (i - b.first * width) * left_row(), map + i * channels, channels, eps);
    }
  }

  // n vectors of h from the one at v on, and what follows them up to the last product, into its left matrix
  void columns(const Band& b, const Memory& m, long v, long n, vf* kept, uint32_t* middle, long step, long column) const {
    fill(b, m, v, n, kept);
    long positions = (b.end - b.y) * width;
    for (long i = 0, some; i < n; i += some) {
      some = together(v + i, v + n);
      if (multiplied) {
        Panel weights = panel(wv, v + i, inner(), depth());
        product<Kind>(positions, depth(), m.left + (b.y - b.first) * width * left_row(), left_row(), weights, some,
                      weights.weights + PANEL * depth(), m.values, 1, positions, false);
      }
      for (long j = i; j < i + some; j++)
        convolve(b, m, v + j, m.h + j * slots() * line(), m.values + (j - i) * positions, middle, step, column + j);
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
    for (long i = 0, some; i < n; i += some) {
      some = together(v + i, v + n);
      Panel weights = panel(w1, v + i, inner(), depth());
      const vf* ahead = weights.weights + PANEL * depth();
      for (long y = b.filled, count; y < b.fresh; y += count, ahead = weights.weights) {
        count = std::min(lines(), b.fresh - y);
        product<Kind>(count * width, depth(), m.left + (y - b.first) * width * left_row(), left_row(), weights, some, ahead,
                      m.row, 1, count * width, false);
        for (long j = 0; j < some; j++)
          for (long k = 0; k < count; k++) {
            const vf* made = m.row + (j * count + k) * width;
            vf *row = m.h + (i + j) * slice + (y + k - b.y + pad()) * line(), before{};
            for (long p = 0; p < width; p++) {
              vf now = gelu(made[p] + b1[v + i + j], x);
              Row::put(row, p + pad(), before, now);
              before = now;
            }
          }
      }
    }
    for (long i = 0; i < n && !b.ends; i++)
      std::memcpy((void*)(kept + i * again), m.h + i * slice + (b.end - b.y) * line(), again * sizeof(vf));
  }

  // What follows the convolution of one vector of channels, into a column of the last product's left matrix
  void convolve(const Band& b, const Memory& m, long v, const vf* h, const vf* values, uint32_t* middle, long step,
                long column) const {
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
          long first = std::max<long>(pad() - b.y - y, 0), last = std::min(kernel, height + pad() - b.y - y);  // on the map
          slide_any<Row>((int)count, sums, window + first, last - first, from, filter + first * kernel, kernel);
        } else {
          nine_any((int)count, sums, window[0] + from, line(), filter, start);
        }
        for (long i = 0; i < count; i++) {
          long p = y * width + from + i;
          vf result = multiplied ? sums[i] * (values[p] + bv[v])
                                   : Row::first(window[pad()][from + i + pad()]) + gelu(sums[i], x);
          put(Kind{}, middle + p * step, column * V, result);
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

  // n vectors of the output from the one at v on
  void put_out(long position, const vf* sums, long v, long n) const {
    long at = position * channels + v * V;
    finish(out + at, x + at, sums, b2 + v, n, channels - v * V);
  }

  // Images are dealt to threads. Those that are left over, fewer than threads, are cut into segments of rows if they have
  // enough of them (the rows around are computed twice), or else worked on by all threads together, part by part.
  int run(long threads) {
    long dealt = images / threads * threads, left = images - dealt;
    long segments = std::clamp<long>(height / (16 + 2 * pad()), 1, threads);
    // a few hundred positions, more where a large kernel needs many rows around
    long bands = std::max<long>(1, height * width / (multiplied ? 448 : 224));
    rows = divided(height, std::min(bands, height)), block = multiplied ? PANEL : 64 / V * Kind::STEP;
    if (deal(0, dealt, 1, threads)) return 1;
    if (left * segments >= threads || !left) return deal(dealt, images, segments, threads);
    rows = divided(height, std::max<long>(1, height * width / MOST_TOGETHER)), block = PANEL;
    return gather(dealt, threads);
  }

  int deal(long first, long last, long segments, long threads) const {
    long failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2) reduction(+ : failed)
    for (long image = first; image < last; image++)
      for (long s = 0; s < segments; s++) try {
          segment(image, height * s / segments, height * (s + 1) / segments);
        } catch (const std::bad_alloc&) {
          failed++;
        }
    return failed > 0;
  }

  int gather(long first, long threads) const {
    auto sizes = own(PANEL, 0);
    vf* memory;
    try {  // here, since a thread that fails would be waited for at the barriers
      memory = scratch(threads * total(sizes) + left_size() + middle_size(inner()));
    } catch (const std::bad_alloc&) {
      return 1;
    }
#pragma omp parallel num_threads(threads)
    {
      long member = omp_get_thread_num(), members = omp_get_num_threads();
      vf* shared = memory + threads * total(sizes);
      Memory m = place(memory + member * total(sizes), sizes, shared, shared + left_size());
      for (long image = first; image < images; image++)
        for (long y = 0; y < height; y += rows) share(image, y, std::min(y + rows, height), m, member, members);
    }
    return 0;
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
