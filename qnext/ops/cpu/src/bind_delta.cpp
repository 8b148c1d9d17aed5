#include "bind.h"
#include "delta.h"

namespace qnext {

void bind_delta(nanobind::module_&) {}

}  // namespace qnext
