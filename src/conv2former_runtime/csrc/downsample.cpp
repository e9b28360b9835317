// Between stages in evaluation, on CPUs: the normalisation and the 2x2 convolution with stride 2, for NHWC tensors.
#include "products.h"

template <class Kind, class T>
struct Downsample {
  static constexpr long MOST_POSITIONS = 8 * TILE;  // of the output in a task
  long images, height, width, channels, outs;       // of the map that is read; channels of the output
  const T* x;
  float eps;
  const vf *weight, *bias;  // packed, the inputs of each of the four places in whole vectors
  T* out;

  long place() const { return words(Kind{}, divided(channels, V) * V); }

  void task(long first, long last) const {
    long n = divided(outs, V), count = last - first, depth = 4 * place();
    vf* sums = scratch(count * n + divided(count * depth, V));
    uint32_t* left = (uint32_t*)(sums + count * n);
    for (long i = first; i < last; i++) {
      long row = i / (width / 2), y = row / (height / 2) * height + row % (height / 2) * 2, at = i % (width / 2) * 2;
      for (long place = 0; place < 4; place++)
        normalise<Kind>(left + (i - first) * depth + place * this->place(),
                        x + ((y + place / 2) * width + at + place % 2) * channels, channels, eps);
    }
    product<Kind>(count, depth, left, depth, weight, 0, depth, n, sums, n, 1, false);
    for (long i = 0; i < count; i++) finish<T>(out + (first + i) * outs, nullptr, sums + i * n, bias, n, outs);
  }

  int run(long threads) const {
    long positions = images * (height / 2) * (width / 2), failed = 0;
    long tasks = std::max(divided(positions, MOST_POSITIONS), std::min(threads, positions));
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : failed)
    for (long i = 0; i < tasks; i++) try {
        task(positions * i / tasks, positions * (i + 1) / tasks);
      } catch (const std::bad_alloc&) {
        failed++;
      }
    return failed > 0;
  }
};

// Shape: images, height, width, channels, channels of the output
extern "C" int conv2former_downsample(int half, const long* n, const void* x, float eps, const vf* weight, const vf* bias,
                                      void* out, int threads) {
  return by_type(half, [&]<class Kind, class T>(Kind, T) {
    return Downsample<Kind, T>{n[0], n[1], n[2], n[3], n[4], (const T*)x, eps, weight, bias, (T*)out}.run(threads);
  });
}
