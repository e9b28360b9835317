// The two branches of a block in evaluation, on CPUs, for NHWC tensors: products with the normalisation before them and
// the sum behind them inside, and an MLP whose hidden layer never leaves the second cache level.
#include "products.h"

// ---- the linear layers of the modulation

// One position's channels into a row of a left matrix, normalised where eps is not negative
template <class Kind, class T>
static inline void take(uint32_t* row, const T* x, long channels, float eps) {
  long whole = channels / V * V, rest = channels - whole;
  vf mean{}, scale = all(1.f);
  if (eps >= 0) {
    vf total = rest ? load(x + whole, rest) : vf{}, squares{};
    for (long c = 0; c < whole; c += V) total += load(x + c);
    mean = all(sum(total) / channels);
    for (long c = 0; c < whole; c += V) {
      vf d = load(x + c) - mean;
      squares += d * d;
    }
    if (rest) {
      vf d = LANES < (int)rest ? load(x + whole, rest) - mean : vf{};
      squares += d * d;
    }
    scale = all(1.f / __builtin_sqrtf(sum(squares) / channels + eps));
  }
  for (long c = 0; c < whole; c += V) put(Kind{}, row, c, (load(x + c) - mean) * scale);
  if (rest) put(Kind{}, row, whole, LANES < (int)rest ? (load(x + whole, rest) - mean) * scale : vf{});
}

// out (rows, outs) = [residual +] norm(x) W + bias
template <class Kind, class T>
static void linear(const T* x, long x_row, long ins, long outs, float eps, const vf* weight, const vf* bias,
                   const T* residual, T* out, long from, long to, long first, long last) {
  long depth = words(Kind{}, ins), count = to - from;
  vf* memory = scratch(divided(count * depth, V) + 1 + count * PANEL);
  uint32_t* left = (uint32_t*)(memory + count * PANEL);
  for (long i = 0; i < count; i++) take<Kind>(left + i * depth, x + (from + i) * x_row, ins, eps);
  for (long v = first; v < last; v += PANEL) {
    long n = std::min<long>(PANEL, last - v);
    product<Kind>(count, depth, left, depth, weight + v * depth, 0, depth, n, memory, n, 1, false);
    for (long i = 0; i < count; i++) {
      long at = (from + i) * outs + v * V;
      finish(out + at, residual ? residual + at : nullptr, memory + i * n, bias + v, n, outs - v * V);
    }
  }
}

template <class Kind, class T>
static int linear_all(const T* x, long x_row, long rows, long ins, long outs, float eps, const vf* weight, const vf* bias,
                      const T* residual, T* out, int threads) {
  constexpr long MOST = 12 * TILE;
  long vectors = divided(outs, V), panels = divided(vectors, PANEL);
  long blocks = divided(rows, MOST);
  blocks = std::min(divided(blocks, threads) * threads, divided(rows, TILE));
  long groups = std::clamp<long>(threads / blocks, 1, panels), failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2) reduction(+ : failed)
  for (long block = 0; block < blocks; block++)
    for (long group = 0; group < groups; group++) try {
        linear<Kind, T>(x, x_row, ins, outs, eps, weight, bias, residual, out, rows * block / blocks,
                        rows * (block + 1) / blocks, panels * group / groups * PANEL,
                        std::min(vectors, panels * (group + 1) / groups * PANEL));
      } catch (const std::bad_alloc&) {
        failed++;
      }
  return failed > 0;
}

// ---- the modulation between its products

extern "C" int conv2former_modulation(int half, const long* shape, const void* u, long u_stride, const void* v, long v_stride,
                                      const float* weight, const float* bias, void* z, void* a, int threads);

// x + proj (DWConv(GELU(U)) * V), U and V the halves of W norm(x)
template <class Kind, class T>
struct ModulationBranch {
  long images, height, width, channels, kernel;
  const T* x;
  float eps;
  const vf *w, *w_bias;
  const float *taps, *taps_bias;
  const vf *proj, *proj_bias;
  T* out;

  int images_at(long first, long count, int threads) const {
    long rows = count * height * width, c = channels, shape[] = {count, height, width, c, kernel};
    T* between = (T*)scratch<1>(divided(rows * 3 * c * sizeof(T), sizeof(vf)));
    T *uv = between, *z = between + rows * 2 * c;
    const T* in = x + first * height * width * c;
    T* to = out + (in - x);
    constexpr int half = std::is_same_v<T, bfloat16>;
    return linear_all<Kind, T>(in, c, rows, c, 2 * c, eps, w, w_bias, nullptr, uv, threads) ||
           conv2former_modulation(half, shape, uv, 2 * c, uv + c, 2 * c, taps, taps_bias, z, nullptr, threads) ||
           linear_all<Kind, T>(z, c, rows, c, c, -1.f, proj, proj_bias, in, to, threads);
  }

  // Some images at a time for each thread, so that what lies between the products stays in a cache; all threads on all
  // images where there are too few of them.
  int run(int threads) const {
    long most = std::max<long>(1, 224 / (height * width)), groups = divided(images, most), failed = 0;
    if (groups % threads && groups < 4 * threads) return images_at(0, images, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : failed)
    for (long g = 0; g < groups; g++) try {
        long from = images * g / groups;
        failed += images_at(from, images * (g + 1) / groups - from, 1);
      } catch (const std::bad_alloc&) {
        failed++;
      }
    return failed > 0;
  }
};

// ---- the MLP

// x + W2 (h + GELU(DWConv3x3(h))), h = GELU(W1 norm(x)). Bands of rows, and in each band a block of hidden channels after
// the other, whose share of the output is added up: of the hidden layer there is never more than a block of a band. The
// last two rows of a band stay for the next.
template <class Kind, class T>
struct Mlp {
  long images, height, width, channels, hidden;
  const T* x;
  float eps;
  const vf *w1, *b1, *taps, *b_taps, *w2, *b2;  // packed; taps as [vector][ky][kx]
  T* out;

  static constexpr long BLOCK = 4 * Kind::STEP;  // vectors of hidden channels: as many words of the second product's depth
  long outs() const { return divided(channels, V); }
  long inner() const { return divided(hidden, V); }
  long band() const {  // rows, a few hundred positions
    long bands = std::max<long>(1, (height * width + 112) / 224);
    return divided(height, std::min(bands, height));
  }
  long slots() const { return band() + 2; }
  long line() const { return width + 2 + STRIP; }

  // Rows [from, to) of an image, with the hidden vectors [first, last): the output, or their share of it where a map for
  // the shares is given.
  void segment(long image, long from, long to, long first, long last, vf* share) const {
    long depth = words(Kind{}, channels), depth2 = words(Kind{}, inner() * V), rows = band();
    long step = words(Kind{}, BLOCK * V), count = last - first;
    long sizes[] = {rows * width * outs(), BLOCK * slots() * line(), count * 2 * line(),
                    divided(slots() * width * depth, V) + 1, divided(rows * width * step, V) + 1};
    vf* memory = scratch(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4]);
    vf *own = memory, *h = own + sizes[0], *kept = h + sizes[1];
    uint32_t *left = (uint32_t*)(kept + sizes[2]), *middle = (uint32_t*)(kept + sizes[2] + sizes[3]);
    std::memset((void*)h, 0, sizes[1] * sizeof(vf));  // the columns beside the map stay zero
    const T* map = x + image * height * width * channels;
    long filled = std::max<long>(from - 1, 0);
    for (long y = from; y < to; y += rows) {
      long end = std::min(y + rows, to), fresh = std::min(end + 1, height);
      vf* sums = share ? share + (image * height + y) * width * outs() : own;
      for (long i = filled * width; i < fresh * width; i++)
        take<Kind>(left + (i - filled * width) * depth, map + i * channels, channels, eps);
      for (long v = first; v < last; v += BLOCK) {
        long n = std::min(BLOCK, last - v);
        hidden_block(h, left, kept + (v - first) * 2 * line(), v, n, y, filled, fresh, end, y == from);
        if (end < to) {
          for (long i = 0; i < n; i++)
            std::memcpy((void*)(kept + (v - first + i) * 2 * line()), h + (i * slots() + end - y) * line(),
                        2 * line() * sizeof(vf));
        }
        for (long i = 0; i < n; i++) convolve(h + i * slots() * line(), middle, step, v + i, i, end - y);
        product<Kind>((end - y) * width, words(Kind{}, n * V), middle, step, w2, words(Kind{}, v * V), depth2, outs(), sums,
                      outs(), 1, v > first);
      }
      for (long i = 0; i < (end - y) * width && !share; i++) put_out((image * height + y) * width + i, sums + i * outs());
      filled = fresh;
    }
  }
  void put_out(long position, const vf* sums) const {
    finish(out + position * channels, x + position * channels, sums, b2, outs(), channels);
  }

  // rows y - 1 to end of n vectors of h, the first two of which are kept from the band before
  void hidden_block(vf* h, const uint32_t* left, const vf* kept, long v, long n, long y, long filled, long fresh, long end,
                    bool starts) const {
    long depth = words(Kind{}, channels);
    for (long i = 0; i < n; i++) {
      vf* slice = h + i * slots() * line();
      if (!starts) std::memcpy((void*)slice, kept + i * 2 * line(), 2 * line() * sizeof(vf));
      if (y == 0) std::memset((void*)slice, 0, line() * sizeof(vf));
      if (end == height) std::memset((void*)(slice + (end - y + 1) * line()), 0, line() * sizeof(vf));
    }
    for (long i = 0; i < n; i += PANEL)
      for (long row = filled; row < fresh; row++) {
        vf* at = h + (i * slots() + row - y + 1) * line() + 1;
        long some = std::min<long>(PANEL, n - i);
        product<Kind>(width, depth, left + (row - filled) * width * depth, depth, w1 + (v + i) * depth, 0, depth, some, at, 1,
                      slots() * line(), false);
        for (long j = 0; j < some; j++)
          for (long p = 0; p < width; p++) {
            vf& value = at[j * slots() * line() + p];
            value = gelu(value + b1[v + i + j], x);
          }
      }
  }

  // h + GELU(DWConv(h)) of one vector of channels into the left matrix of the second product
  void convolve(const vf* h, uint32_t* middle, long step, long v, long i, long rows) const {
    const vf* w = taps + v * 9;
    long strips = divided(width, STRIP);
    for (long y = 0; y < rows; y++)
      for (long s = 0; s < strips; s++) {
        long from = width * s / strips, count = width * (s + 1) / strips - from;
        vf total[STRIP];
        const vf* above = h + y * line() + from;
        nine_any(count, total, above, line(), w, b_taps[v]);
        for (long p = 0; p < count; p++)
          put(Kind{}, middle + (y * width + from + p) * step, i * V, above[line() + p + 1] + gelu(total[p], x));
      }
  }
  template <int N = STRIP>
  static inline void nine_any(long count, vf* total, const vf* h, long line, const vf* w, vf start) {
    if constexpr (N > 0) {
      if (count == N) return nine<N>(total, h, line, w, start);
      nine_any<N - 1>(count, total, h, line, w, start);
    }
  }
  template <int N>
  static void nine(vf* total, const vf* h, long line, const vf* w, vf start) {
    vf s[N];
    for (int i = 0; i < N; i++) s[i] = start;
    for (long ky = 0; ky < 3; ky++, h += line)
      for (long kx = 0; kx < 3; kx++)
        for (int i = 0; i < N; i++) s[i] += h[kx + i] * w[ky * 3 + kx];
    for (int i = 0; i < N; i++) total[i] = s[i];
  }

  // Images are dealt to threads. Where that leaves some idle, an image is cut into segments of rows if it has many of them
  // (their neighbours' rows are computed twice), and the hidden layer into parts, whose shares are added up at the end.
  int run(int threads) const {
    long positions = images * height * width, blocks = divided(inner(), BLOCK);
    bool uneven = images % threads && images < 4 * threads;
    long segments = uneven ? std::clamp<long>(height / 14, 1, threads) : 1;
    long parts = uneven ? std::clamp<long>(divided(threads, images * segments), 1, blocks) : 1, failed = 0;
    vf* shares = nullptr;
    if (parts > 1) {
      shares = (vf*)std::aligned_alloc(64, divided(parts * positions * outs() * sizeof(vf), 64) * 64);
      if (!shares) return 1;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(3) reduction(+ : failed)
    for (long image = 0; image < images; image++)
      for (long s = 0; s < segments; s++)
        for (long part = 0; part < parts; part++) try {
            segment(image, height * s / segments, height * (s + 1) / segments, blocks * part / parts * BLOCK,
                    std::min(blocks * (part + 1) / parts * BLOCK, inner()),
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

extern "C" {
int conv2former_pairs() { return PAIRS; }
int conv2former_panel() { return PANEL * V; }

int conv2former_modulation_branch(int half, const long* shape, const void* x, float eps, const void* w, const void* w_bias,
                                  const float* taps, const float* taps_bias, const void* proj, const void* proj_bias, void* out,
                                  int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    ModulationBranch<Kind, T> op{shape[0],       shape[1],        shape[2], shape[3],         shape[4],
                                 (const T*)x,    eps,             (const vf*)w, (const vf*)w_bias, taps,
                                 taps_bias,      (const vf*)proj, (const vf*)proj_bias, (T*)out};
    return op.run(threads);
  });
}

int conv2former_mlp_branch(int half, const long* shape, const void* x, float eps, const void* w1, const void* b1, const void* taps,
                    const void* b_taps, const void* w2, const void* b2, void* out, int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    Mlp<Kind, T> op{shape[0], shape[1], shape[2], shape[3], shape[4], (const T*)x, eps, (const vf*)w1, (const vf*)b1,
                    (const vf*)taps, (const vf*)b_taps, (const vf*)w2, (const vf*)b2, (T*)out};
    return op.run(threads);
  });
}
}
