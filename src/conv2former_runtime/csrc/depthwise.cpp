// Convolutional modulation and the MLP's middle on CPUs, forward and backward, for NHWC tensors.
//
// One task is a block of V channels of some images. A task keeps a ring of rows of the map, widened to float and with
// GELU applied once per element, so that the taps of the depthwise convolution read aligned vectors of V channels out
// of the first cache level. Where the processor multiplies pairs of bfloat16 (AVX512-BF16), bfloat16 tensors keep each
// position together with its right neighbour, and one instruction does two taps.
//
// Written with the compiler's vector extensions: the same source serves AVX-512, AVX2 and NEON.
#include "vectors.h"

struct Shape {
  long images, height, width, channels, kernel;
  long pad() const { return kernel / 2; }
  long row() const { return width + 2 * pad() + STRIP + 2; }  // positions of a row in scratch, what strips read beyond it too
  long blocks() const { return (channels + V - 1) / V; }
  // the last block overlaps the one before where V does not divide the channels: both write the same numbers there
  long block(long i) const { return std::min(i * V, channels - V); }
};

// Rows of one map, in turn; outside of the map they are zero.
class Ring {
 public:
  Ring() = default;
  Ring(vf* memory, const Shape& shape, long rows) : base(memory), shape(&shape), rows(rows) {
    std::memset((void*)base, 0, size(shape, rows) * sizeof(vf));  // the columns beside the map stay so
  }
  static long size(const Shape& shape, long rows) { return (rows + 1) * shape.row(); }
  vf* slot(long y) { return base + (y % rows) * shape->row(); }
  const vf* get(long y) { return y < 0 || y >= shape->height ? base + rows * shape->row() : slot(y); }
  void window(const vf** out, long y) {
    for (long i = 0; i < shape->kernel; i++) out[i] = get(y - shape->pad() + i);
  }

 private:
  vf* base;
  const Shape* shape;
  long rows;
};

// Weights (C, 1, k, k) of a block of channels as vectors [ky][kx], turned by 180 degrees for the transposed convolution
template <class Kind>
static void gather(vf* filter, const float* weight, const Shape& s, long c, bool turned) {
  long taps = s.kernel * s.kernel;
  for (long ky = 0; ky < s.kernel; ky++) {
    vf right{};
    for (long kx = s.kernel - 1; kx >= 0; kx--) {
      long i = ky * s.kernel + kx, from = turned ? taps - 1 - i : i;
      vf w;
      for (int lane = 0; lane < V; lane++) w[lane] = weight[(c + lane) * taps + from];
      filter[i] = Kind::pack(w, right);
      right = w;
    }
  }
}

template <class Act>
static inline void for_strips(const Shape& s, long from, long to, Act act) {
  long strips = (s.width + STRIP - 1) / STRIP, step = (s.width + strips - 1) / strips;
  for (long x = 0; x < s.width; x += step)
    for (long y = from; y < to; y++) act(y, x, (int)std::min(step, s.width - x));
}

// Images dealt to tasks: fixed by the shape alone, so that sums do not depend on the number of threads
static long groups(const Shape& s) { return std::min(s.images, std::max<long>(1, 64 / s.blocks())); }

// Runs an operation over all channels and images. Neighbouring blocks of channels, a team, are one task and take turns
// band by band: they share cache lines and pages of memory, and looking up a page costs more than the work on a line of
// it. A team is as large as the second cache level and an even share of the work for each thread allow. An operation has
// for each block a `State` and says how to `begin` it, what to do at each new `image`, for each `band` of rows, and at the
// `end` of its images.
template <class T, class Operation>
static int run(const Operation& op, int threads) {
  constexpr long MOST_MATES = 4, CACHE = 512 * 1024, LINE = std::max<long>(1, 64 / (V * sizeof(T)));
  const Shape& s = op.s;
  long blocks = s.blocks(), parts = groups(s), failed = 0;
  long share = std::min<long>(CACHE / (op.memory() * sizeof(vf)), blocks * parts / (4 * threads));
  long most = std::clamp(share, std::min(LINE, MOST_MATES), MOST_MATES), teams = (blocks + most - 1) / most;
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2) reduction(+ : failed)
  for (long part = 0; part < parts; part++)
    for (long team = 0; team < teams; team++) try {
        typename Operation::State states[MOST_MATES];
        long first = blocks * team / teams, mates = blocks * (team + 1) / teams - first;
        vf* memory = scratch(mates * op.memory());
        for (long i = 0; i < mates; i++) op.begin(states[i], memory + i * op.memory(), s.block(first + i));
        for (long b = s.images * part / parts; b < s.images * (part + 1) / parts; b++) {
          for (long i = 0; i < mates; i++) op.image(states[i], b * s.height * s.width);
          for (long y = 0; y < s.height; y += BAND)
            for (long i = 0; i < mates; i++) op.band(states[i], y, std::min(y + BAND, s.height));
        }
        for (long i = 0; i < mates; i++) op.end(states[i], part);
      } catch (const std::bad_alloc&) {
        failed++;
      }
  return failed > 0;
}

// A tensor of (images * height * width, channels) positions that are `stride` elements apart
template <class T>
struct Map {
  T* data;
  long stride;
  vf operator()(long position, long c) const { return load(data + position * stride + c); }
  void set(long position, long c, vf x) const { store(data + position * stride + c, x); }
  // Asks for what the next band needs. Positions are a line or two at a distance, which hardware does not foresee.
  void expect(long position, long c) const { __builtin_prefetch(data + position * stride + c, !std::is_const_v<T>, 2); }
};

// Appends GELU(u) of the rows up to `end` to a ring
template <class Kind, class T>
static inline void fill(Ring& ring, long& filled, long end, const Shape& s, Map<const T> u, long base, long c) {
  for (; filled < std::min(end, s.height); filled++) {
    vf *row = ring.slot(filled), before{};
    for (long x = 0; x < s.width; x++) {
      vf now = gelu(u(base + filled * s.width + x, c), u.data);
      Kind::put(row, x + s.pad(), before, now);
      before = now;
    }
  }
}

// ---- the operations

template <class Kind, class T>
struct Modulation {
  Shape s;
  Map<const T> u, v;
  const float *weight, *bias;
  Map<T> z, a;  // a.data may be null

  struct State {
    long c, base, filled;
    vf *filter, start;
    Ring h;
  };
  long rows() const { return BAND + 2 * s.pad(); }
  long memory() const { return Ring::size(s, rows()) + s.kernel * s.kernel; }
  void begin(State& t, vf* memory, long c) const {
    t.c = c, t.h = Ring(memory, s, rows()), t.filter = memory + Ring::size(s, rows()), t.start = load(bias + c);
    gather<Kind>(t.filter, weight, s, c, false);
  }
  void image(State& t, long base) const { t.base = base, t.filled = 0; }
  void band(State& t, long from, long to) const {
    fill<Kind>(t.h, t.filled, to + s.pad(), s, u, t.base, t.c);
    for_strips(s, from, to, [&](long y, long x, int width) {
      const vf* window[MOST];
      vf sums[STRIP];
      t.h.window(window, y);
      for (int i = 0; i < width; i++) sums[i] = t.start;
      slide_any<Kind>(width, sums, window, s.kernel, x, t.filter, s.kernel);
      for (int i = 0; i < width; i++) {
        long at = t.base + y * s.width + x + i, next = at + BAND * s.width;
        u.expect(next + s.pad() * s.width, t.c), v.expect(next, t.c), z.expect(next, t.c);
        if (a.data) a.set(at, t.c, sums[i]);
        z.set(at, t.c, sums[i] * v(at, t.c));
      }
    });
  }
  void end(State&, long) const {}
};

// Sums over images of the gradients of the depthwise weights and of the bias: one row of `partial` (groups, k * k + 1, C),
// the bias last
struct Sums {
  vf *taps, bias;
  void clear(vf* memory, const Shape& s) {
    taps = memory, bias = vf{};
    std::memset((void*)taps, 0, s.kernel * s.kernel * sizeof(vf));
  }
  // h[y + ky - p][x + kx - p] * d[y][x] over a band, for every tap; first by themselves, which loses fewer digits than
  // adding one product after the other to the sum of the whole map
  template <class Kind>
  void add(Ring& h, Ring& d, const Shape& s, long from, long to) {
    long p = s.pad();
    for (long ky = 0; ky < s.kernel; ky++)
      for (long kx = 0; kx < s.kernel; kx += STRIP) {
        int width = (int)std::min<long>(STRIP, s.kernel - kx);
        vf band[STRIP] = {};
        for (long y = from; y < to; y++) {
          const vf* row = h.get(y + ky - p);
          slide_any<Kind>(width, band, &row, 1, kx, d.get(y) + p, s.width);
        }
        for (int i = 0; i < width; i++) taps[ky * s.kernel + kx + i] += band[i];
      }
  }
  void write(float* partial, const Shape& s, long part, long c) const {
    long count = s.kernel * s.kernel;
    float* out = partial + part * (count + 1) * s.channels + c;
    for (long i = 0; i < count; i++) store(out + i * s.channels, taps[i]);
    store(out + count * s.channels, bias);
  }
};

template <class Kind, class T>
struct ModulationBackward {
  Shape s;
  Map<const T> g, u, v, a;
  const float* weight;
  Map<T> du, dv;
  float* partial;

  struct State {
    long c, base, filled;
    vf* filter;
    Ring h, d;  // GELU(u); the gradient of A
    Sums sums;
  };
  long rows() const { return BAND + 2 * s.pad(); }
  long memory() const { return 2 * Ring::size(s, rows()) + 2 * s.kernel * s.kernel; }
  void begin(State& t, vf* memory, long c) const {
    t.c = c, t.h = Ring(memory, s, rows()), t.d = Ring(memory + Ring::size(s, rows()), s, rows());
    t.filter = memory + 2 * Ring::size(s, rows());
    gather<Kind>(t.filter, weight, s, c, true);
    t.sums.clear(t.filter + s.kernel * s.kernel, s);
  }
  void image(State& t, long base) const { t.base = base, t.filled = 0; }
  void band(State& t, long from, long to) const {
    for (; t.filled < std::min(to + s.pad(), s.height); t.filled++) {
      vf *h = t.h.slot(t.filled), *d = t.d.slot(t.filled), h_before{}, d_before{}, total{};
      for (long x = 0; x < s.width; x++) {
        long at = t.base + t.filled * s.width + x;
        vf upper = g(at, t.c), h_now = gelu(u(at, t.c), u.data), d_now = upper * v(at, t.c);
        dv.set(at, t.c, upper * a(at, t.c));
        Kind::put(h, x + s.pad(), h_before, h_now);
        Kind::put(d, x + s.pad(), d_before, d_now);
        total += d_now, h_before = h_now, d_before = d_now;
      }
      t.sums.bias += total;
    }
    for_strips(s, from, to, [&](long y, long x, int width) {
      const vf* window[MOST];
      vf dh[STRIP] = {};
      t.d.window(window, y);
      slide_any<Kind>(width, dh, window, s.kernel, x, t.filter, s.kernel);
      for (int i = 0; i < width; i++) {
        long at = t.base + y * s.width + x + i, next = at + BAND * s.width, later = next + s.pad() * s.width;
        g.expect(later, t.c), u.expect(later, t.c), v.expect(later, t.c), a.expect(later, t.c);
        du.expect(next, t.c), dv.expect(later, t.c);
        du.set(at, t.c, dh[i] * gelu_slope(u(at, t.c)));
      }
    });
    t.sums.template add<Kind>(t.h, t.d, s, from, to);
  }
  void end(State& t, long part) const { t.sums.write(partial, s, part, t.c); }
};

template <class Kind, class T>
struct MlpMiddle {
  Shape s;
  Map<const T> u;
  const float *weight, *bias;
  Map<T> out;

  struct State {
    long c, base, filled;
    vf *filter, start;
    Ring h;
  };
  long rows() const { return BAND + 2; }
  long memory() const { return Ring::size(s, rows()) + 9; }
  void begin(State& t, vf* memory, long c) const {
    t.c = c, t.h = Ring(memory, s, rows()), t.filter = memory + Ring::size(s, rows()), t.start = load(bias + c);
    gather<Kind>(t.filter, weight, s, c, false);
  }
  void image(State& t, long base) const { t.base = base, t.filled = 0; }
  void band(State& t, long from, long to) const {
    fill<Kind>(t.h, t.filled, to + 1, s, u, t.base, t.c);
    for_strips(s, from, to, [&](long y, long x, int width) {
      const vf* window[3];
      vf sums[STRIP];
      t.h.window(window, y);
      for (int i = 0; i < width; i++) sums[i] = t.start;
      slide_any<Kind>(width, sums, window, 3, x, t.filter, 3);
      for (int i = 0; i < width; i++) {
        long at = t.base + y * s.width + x + i, next = at + BAND * s.width;
        u.expect(next + s.width, t.c), out.expect(next, t.c);
        out.set(at, t.c, Kind::first(window[1][x + i + 1]) + gelu(sums[i], u.data));
      }
    });
  }
  void end(State&, long) const {}
};

template <class Kind, class T>
struct MlpMiddleBackward {
  Shape s;
  Map<const T> g, u;
  const float *weight, *bias;
  Map<T> du;
  float* partial;

  struct State {
    long c, base, filled, recomputed;
    vf *filter, *turned, start;
    Ring h, d;  // GELU(u); the gradient of the convolution's output
    Sums sums;
  };
  long rows() const { return BAND + 4; }
  long memory() const { return 2 * Ring::size(s, rows()) + 27; }
  void begin(State& t, vf* memory, long c) const {
    t.c = c, t.h = Ring(memory, s, rows()), t.d = Ring(memory + Ring::size(s, rows()), s, rows());
    t.filter = memory + 2 * Ring::size(s, rows()), t.turned = t.filter + 9, t.start = load(bias + c);
    gather<Kind>(t.filter, weight, s, c, false);
    gather<Kind>(t.turned, weight, s, c, true);
    t.sums.clear(t.turned + 9, s);
  }
  void image(State& t, long base) const { t.base = base, t.filled = t.recomputed = 0; }
  void band(State& t, long from, long to) const {
    fill<Kind>(t.h, t.filled, to + 2, s, u, t.base, t.c);
    for (; t.recomputed < std::min(to + 1, s.height); t.recomputed++) {  // one row more than the band
      vf *row = t.d.slot(t.recomputed), before{}, total{};
      const vf* window[3];
      t.h.window(window, t.recomputed);
      for_strips(s, t.recomputed, t.recomputed + 1, [&](long y, long x, int width) {
        vf inner[STRIP];
        for (int i = 0; i < width; i++) inner[i] = t.start;
        slide_any<Kind>(width, inner, window, 3, x, t.filter, 3);
        for (int i = 0; i < width; i++) {
          vf now = g(t.base + y * s.width + x + i, t.c) * gelu_slope(inner[i]);
          Kind::put(row, x + i + 1, before, now);
          total += now, before = now;
        }
      });
      t.sums.bias += total;
    }
    for_strips(s, from, to, [&](long y, long x, int width) {
      const vf* window[3];
      vf dh[STRIP] = {};
      t.d.window(window, y);
      slide_any<Kind>(width, dh, window, 3, x, t.turned, 3);
      for (int i = 0; i < width; i++) {
        long at = t.base + y * s.width + x + i, next = at + BAND * s.width;
        g.expect(next + s.width, t.c), u.expect(next + 2 * s.width, t.c), du.expect(next, t.c);
        du.set(at, t.c, (g(at, t.c) + dh[i]) * gelu_slope(u(at, t.c)));
      }
    });
    t.sums.template add<Kind>(t.h, t.d, s, from, to);
  }
  void end(State& t, long part) const { t.sums.write(partial, s, part, t.c); }
};

template <class T>
static Map<const T> in(T, const void* data, long stride) { return {(const T*)data, stride}; }
template <class T>
static Map<T> out(T, void* data, long stride) { return {(T*)data, stride}; }

static Shape shape_of(const long* n) { return {n[0], n[1], n[2], n[3], n[4]}; }

// ---- what Python calls. `half` chooses bfloat16, `shape` is images, height, width, channels, kernel; the strides of u and
// v are given, everything else is contiguous. 0, or 1 where memory ran out.
extern "C" {
int conv2former_lanes() { return V; }
int conv2former_largest_kernel() { return MOST; }
long conv2former_groups(long images, long channels) { return groups({images, 1, 1, channels, 1}); }

int conv2former_modulation(int half, const long* shape, const void* u, long u_stride, const void* v, long v_stride,
                           const float* weight, const float* bias, void* z, void* a, int threads) {
  Shape s = shape_of(shape);
  return by_type(half, [&]<class Kind, class T>(Kind, T t) {
    return run<T>(Modulation<Kind, T>{s, in(t, u, u_stride), in(t, v, v_stride), weight, bias, out(t, z, s.channels),
                                      out(t, a, s.channels)},
                  threads);
  });
}

int conv2former_modulation_backward(int half, const long* shape, const void* g, const void* u, long u_stride, const void* v,
                                    long v_stride, const void* a, const float* weight, void* du, void* dv, float* partial,
                                    int threads) {
  Shape s = shape_of(shape);
  return by_type(half, [&]<class Kind, class T>(Kind, T t) {
    return run<T>(ModulationBackward<Kind, T>{s, in(t, g, s.channels), in(t, u, u_stride), in(t, v, v_stride),
                                              in(t, a, s.channels), weight, out(t, du, s.channels),
                                              out(t, dv, s.channels), partial},
                  threads);
  });
}

int conv2former_mlp_middle(int half, const long* shape, const void* u, long u_stride, const float* weight, const float* bias,
                           void* result, int threads) {
  Shape s = shape_of(shape);
  return by_type(half, [&]<class Kind, class T>(Kind, T t) {
    return run<T>(MlpMiddle<Kind, T>{s, in(t, u, u_stride), weight, bias, out(t, result, s.channels)}, threads);
  });
}

int conv2former_mlp_middle_backward(int half, const long* shape, const void* g, const void* u, long u_stride,
                                    const float* weight, const float* bias, void* du, float* partial, int threads) {
  Shape s = shape_of(shape);
  return by_type(half, [&]<class Kind, class T>(Kind, T t) {
    return run<T>(MlpMiddleBackward<Kind, T>{s, in(t, g, s.channels), in(t, u, u_stride), weight, bias,
                                             out(t, du, s.channels), partial},
                  threads);
  });
}
}
