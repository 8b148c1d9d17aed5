#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qnext {

#if defined(__x86_64__)
// Whether the CPU multiplies tiles of bytes and the system lends this process their registers, which it must be asked for.
static bool has_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return has_tiles() ? Isa::avx512_amx : Isa::avx512_bf16;
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
    case Isa::avx512_amx: return "avx512_amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace qnext
