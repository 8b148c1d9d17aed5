#include "bind.h"
#include "attention.h"

namespace qnext {

void bind_attention(nanobind::module_&) {}

}  // namespace qnext
