// What this processor can run, asked of the processor itself: compiled for the oldest x86-64 or ARM of 64 bits.
extern "C" int conv2former_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v3")) return 0;
  if (!__builtin_cpu_supports("x86-64-v4")) return 1;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#elif defined(__aarch64__)
  return 1;
#else
  return 0;
#endif
}
