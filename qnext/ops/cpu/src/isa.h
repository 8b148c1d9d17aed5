// Which compiled form of the kernels this machine runs.
#pragma once

namespace qnext {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, avx512_amx = 4 };

// Chosen once from the CPU's features; force_isa() may lower it (for tests). Raises std::invalid_argument for a form
// that the CPU cannot run.
Isa active_isa();
Isa best_isa();
void force_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace qnext

// AMX is no form of its own: kernels of avx512_bf16 ask for it (gemm_tiles.cpp).
// A family of kernels is a struct of function pointers. Each instruction set defines one, `const Table name`, in its own
// namespace; QNEXT_DISPATCH(Table, name) declares them all and a function name() that gives the active one.
#if defined(__x86_64__)
#define QNEXT_DISPATCH(Table, name)                    \
  namespace qnext {                                    \
  namespace generic { extern const Table name; }       \
  namespace avx2 { extern const Table name; }          \
  namespace avx512 { extern const Table name; }        \
  namespace avx512_bf16 { extern const Table name; }   \
  inline const Table& active_##name() {                \
    switch (active_isa()) {                            \
      case Isa::avx512_amx:                            \
      case Isa::avx512_bf16: return avx512_bf16::name; \
      case Isa::avx512: return avx512::name;           \
      case Isa::avx2: return avx2::name;               \
      default: return generic::name;                   \
    }                                                  \
  }                                                    \
  }
#else
#define QNEXT_DISPATCH(Table, name)                                      \
  namespace qnext {                                                      \
  namespace generic { extern const Table name; }                         \
  inline const Table& active_##name() { return generic::name; }          \
  }
#endif
