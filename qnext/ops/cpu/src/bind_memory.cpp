// Memory for weights.
#include <sys/mman.h>

#include <stdexcept>

#include "bind.h"

namespace qnext {

void bind_memory(nanobind::module_& m) {
  m.def(
      "advise_huge",
      [](uintptr_t address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
        return madvise(pointer<void>(address), static_cast<size_t>(bytes), MADV_HUGEPAGE) == 0;
#else
        return false;
#endif
      },
      "Ask for huge pages in a page-aligned range that is not touched yet; false where the system has none.");
}

}  // namespace qnext
