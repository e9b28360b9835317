// The classifier in evaluation, on CPUs, for NHWC tensors: linear, GELU, LayerNorm, mean over positions, linear.
#include "products.h"

template <class Kind, class T>
struct Head {
  static constexpr long MOST_POSITIONS = 2 * TILE;  // in a task
  long images, positions, channels, hidden, classes;
  const T* x;
  float eps;
  const vf *w1, *b1, *scale, *offset, *w2, *b2;
  T* out;

  long inner() const { return divided(hidden, V); }
  long depth() const { return words(Kind{}, divided(channels, V) * V); }
  long tasks() const { return divided(positions, MOST_POSITIONS); }

  // total = the sum of the normalised hidden layer over some positions of an image
  void task(long image, long first, long last, vf* total) const {
    long n = inner(), count = last - first;
    vf* sums = scratch(count * n + divided(count * depth(), V));
    uint32_t* left = (uint32_t*)(sums + count * n);
    for (long i = 0; i < count; i++) {
      const T* from = x + (image * positions + first + i) * channels;
      for (long c = 0; c < channels; c += V) put(Kind{}, left + i * depth(), c, load_up_to(from + c, channels - c));
    }
    product<Kind>(count, depth(), left, depth(), w1, 0, depth(), n, sums, n, 1, false);
    std::fill(total, total + n, vf{});
    for (long i = 0; i < count; i++, sums += n) {
      vf whole{}, squares{};
      for (long v = 0; v < n; v++) whole += sums[v] = gelu(sums[v] + b1[v], x);  // zero behind the last channel
      vf mean = all(sum(whole) / hidden);
      for (long v = 0; v < n; v++) {
        sums[v] = first_of(sums[v] - mean, std::min<long>(hidden - v * V, V));
        squares += sums[v] * sums[v];
      }
      vf factor = all(1.f / __builtin_sqrtf(sum(squares) / hidden + eps));
      for (long v = 0; v < n; v++) total[v] += sums[v] * factor;
    }
  }

  // Some vectors of all outputs
  void classify(const uint32_t* left, long row, long v) const {
    long n = together(v, divided(classes, V));
    Panel weights = panel(w2, v, divided(classes, V), row);
    vf* sums = scratch(images * n);
    product<Kind>(images, row, left, row, weights, n, weights.weights + PANEL * row, sums, n, 1, false);
    for (long i = 0; i < images; i++)
      finish<T>(out + i * classes + v * V, nullptr, sums + i * n, b2 + v, n, classes - v * V);
  }

  int run(int threads) const {
    long n = inner(), row = words(Kind{}, n * V), failed = 0;
    long bytes = (images * tasks() * n + divided(images * row, V)) * sizeof(vf);
    vf* totals = (vf*)std::aligned_alloc(64, divided(bytes, 64) * 64);
    if (!totals) return 1;
    uint32_t* left = (uint32_t*)(totals + images * tasks() * n);
#pragma omp parallel num_threads(threads) reduction(+ : failed)
    {
#pragma omp for schedule(dynamic) collapse(2)
      for (long image = 0; image < images; image++)
        for (long i = 0; i < tasks(); i++) try {
            task(image, positions * i / tasks(), positions * (i + 1) / tasks(), totals + (image * tasks() + i) * n);
          } catch (const std::bad_alloc&) {
            failed++;
          }
#pragma omp for collapse(2)
      for (long image = 0; image < images; image++)
        for (long v = 0; v < n; v++) {
          vf mean{};
          for (long i = 0; i < tasks(); i++) mean += totals[(image * tasks() + i) * n + v];
          put(Kind{}, left + image * row, v * V, mean / (float)positions * scale[v] + offset[v]);
        }
#pragma omp for
      for (long v = 0; v < divided(classes, V); v += PANEL) try {
          classify(left, row, v);
        } catch (const std::bad_alloc&) {
          failed++;
        }
    }
    std::free(totals);
    return failed > 0;
  }
};

// Shape: images, positions, channels, channels of the hidden layer, classes
extern "C" int conv2former_head(int half, const long* n, const void* x, float eps, const vf* w1, const vf* b1, const vf* scale,
                                const vf* offset, const vf* w2, const vf* b2, void* out, int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    return Head<Kind, T>{n[0], n[1], n[2], n[3], n[4], (const T*)x, eps, w1, b1, scale, offset, w2, b2, (T*)out}.run(threads);
  });
}
