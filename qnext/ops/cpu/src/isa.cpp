#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace qnext {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (has_avx512) return Isa::avx512;
  // Every CPU with AVX2 and FMA has F16C, which GCC 12 cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

static std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

void force_isa(Isa isa) {
  if (isa < Isa::generic || isa > best_isa())
    throw std::invalid_argument("this CPU cannot run that instruction set");
  chosen().store(isa);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace qnext
