// The stem in evaluation, on CPUs: 3x3, GELU, batch norm, 3x3, GELU, (batch norm), 2x2 with stride 2, for NHWC images.
//
// A row of a convolution is a product for each row of its kernel: the left matrix is a row of the map itself, whose
// positions overlap. A task goes through all three convolutions for a few rows of the output, so that what lies between
// stays in a cache.
#include "products.h"

struct Convolution {
  long ins, outs, kernel, stride, pad;
  const vf* weight;                 // packed for each row of the kernel
  const vf *scale, *offset, *bias;  // in whole vectors: behind GELU, null for none; of the last convolution
  long vectors() const { return divided(outs, V); }
  long size(long n) const { return (n + 2 * pad - kernel) / stride + 1; }
};

template <class Kind, class T>
struct Stem {
  static constexpr int LAYERS = 3;
  static constexpr long ROWS = 4;  // of the output in a task
  long images;
  Convolution layers[LAYERS];
  long heights[LAYERS + 1], widths[LAYERS + 1];  // of the image, of each convolution's output
  const T* x;
  T* out;

  // Words of a row of what a layer reads: the margin, the row, the margin, and what the last vector writes beyond
  long row(int i) const { return (widths[i] + 2 * layers[i].pad) * words(Kind{}, layers[i].ins) + V; }

  void segment(long image, long first, long last) const {
    long from[LAYERS + 1], to[LAYERS + 1], size = 0, sums = 0;
    uint32_t* rows[LAYERS];
    from[LAYERS] = first, to[LAYERS] = last;
    for (int i = LAYERS - 1; i >= 0; i--) {
      const Convolution& layer = layers[i];
      from[i] = from[i + 1] * layer.stride - layer.pad;
      to[i] = (to[i + 1] - 1) * layer.stride - layer.pad + layer.kernel;
      size += divided((to[i] - from[i]) * row(i), V);
      sums = std::max(sums, widths[i + 1] * layer.vectors());
    }
    vf* memory = scratch(size + sums);
    vf* next = memory + sums;
    for (int i = 0; i < LAYERS; i++) {
      rows[i] = (uint32_t*)next;
      next += divided((to[i] - from[i]) * row(i), V);
    }
    for (long y = from[0]; y < to[0]; y++) picture_row(rows[0] + (y - from[0]) * row(0), image, y);
    for (int i = 0; i < LAYERS; i++)
      for (long y = from[i + 1]; y < to[i + 1]; y++) {
        uint32_t* target = i + 1 < LAYERS ? rows[i + 1] + (y - from[i + 1]) * row(i + 1) : nullptr;
        if (y < 0 || y >= heights[i + 1]) {
          std::memset(target, 0, row(i + 1) * sizeof(uint32_t));
          continue;
        }
        const uint32_t* source = rows[i] + (y * layers[i].stride - layers[i].pad - from[i]) * row(i);
        convolve(layers[i], source, row(i), widths[i + 1], memory);
        target ? keep(i, target, memory) : put_out(memory, (image * heights[LAYERS] + y) * widths[LAYERS]);
      }
  }

  void picture_row(uint32_t* target, long image, long y) const {
    const Convolution& layer = layers[0];
    std::memset(target, 0, row(0) * sizeof(uint32_t));
    if (y < 0 || y >= heights[0]) return;
    const T* source = x + (image * heights[0] + y) * widths[0] * layer.ins;
    target += layer.pad * words(Kind{}, layer.ins);
    for (long i = 0; i < widths[0]; i++, source += layer.ins, target += words(Kind{}, layer.ins))
      for (long c = 0; c < layer.ins; c++) put_one(Kind{}, target, c, source[c]);
  }
  static inline void put_one(Plain, uint32_t* target, long c, float value) { std::memcpy(target + c, &value, sizeof value); }
  static inline void put_one(Plain, uint32_t* target, long c, bfloat16 value) { target[c] = (uint32_t)value.bits << 16; }
#if PAIRS
  static inline void put_one(Paired, uint32_t* target, long c, bfloat16 value) {
    std::memcpy((char*)target + c * sizeof value, &value, sizeof value);
  }
#endif

  static void convolve(const Convolution& layer, const uint32_t* source, long row, long width, vf* sums) {
    long each = words(Kind{}, layer.ins), depth = layer.kernel * each, n = layer.vectors();
    for (long ky = 0; ky < layer.kernel; ky++)
      product<Kind>(width, depth, source + ky * row, layer.stride * each, layer.weight + ky * n * depth, 0, depth, n, sums, n, 1,
                    ky > 0);
  }

  void keep(int i, uint32_t* target, const vf* sums) const {
    const Convolution &layer = layers[i], &reader = layers[i + 1];
    long each = words(Kind{}, layer.outs), n = layer.vectors(), left = reader.pad * each, right = left + widths[i + 1] * each;
    std::memset(target, 0, left * sizeof(uint32_t));
    for (long p = 0; p < widths[i + 1]; p++)
      for (long v = 0; v < n; v++) {
        vf y = gelu(sums[p * n + v], x);
        put(Kind{}, target + left + p * each, v * V, layer.scale ? y * layer.scale[v] + layer.offset[v] : y);
      }
    std::memset(target + right, 0, (row(i + 1) - right) * sizeof(uint32_t));
  }

  void put_out(const vf* sums, long position) const {
    const Convolution& layer = layers[LAYERS - 1];
    long n = layer.vectors();
    for (long p = 0; p < widths[LAYERS]; p++)
      finish<T>(out + (position + p) * layer.outs, nullptr, sums + p * n, layer.bias, n, layer.outs);
  }

  int run(int threads) const {
    long segments = divided(heights[LAYERS], ROWS), failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2) reduction(+ : failed)
    for (long image = 0; image < images; image++)
      for (long s = 0; s < segments; s++) try {
          segment(image, heights[LAYERS] * s / segments, heights[LAYERS] * (s + 1) / segments);
        } catch (const std::bad_alloc&) {
          failed++;
        }
    return failed > 0;
  }
};

// Shape: images, height, width, channels of the image, between, of the output, strides of the first two convolutions
extern "C" int conv2former_stem(int half, const long* shape, const void* x, const void* weight1, const void* scale,
                                const void* offset, const void* weight2, const void* weight3, const void* bias3, void* out,
                                int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    Stem<Kind, T> op{shape[0],
                     {{shape[3], shape[4], 3, shape[6], 1, (const vf*)weight1, (const vf*)scale, (const vf*)offset, nullptr},
                      {shape[4], shape[4], 3, shape[7], 1, (const vf*)weight2, nullptr, nullptr, nullptr},
                      {shape[4], shape[5], 2, 2, 0, (const vf*)weight3, nullptr, nullptr, (const vf*)bias3}},
                     {shape[1]},
                     {shape[2]},
                     (const T*)x,
                     (T*)out};
    for (int i = 0; i < op.LAYERS; i++) {
      op.heights[i + 1] = op.layers[i].size(op.heights[i]);
      op.widths[i + 1] = op.layers[i].size(op.widths[i]);
    }
    return op.run(threads);
  });
}
