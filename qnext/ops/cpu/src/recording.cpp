#include "recording.h"

#include <stdexcept>

namespace qnext {

thread_local Recording* Recording::active_ = nullptr;

void Recording::start() {
  if (active_) throw std::logic_error("a recording is under way in this thread");
  active_ = this;
}

void Recording::stop() {
  if (active_ == this) active_ = nullptr;
}

void Recording::replay() const {
  if (active_) throw std::logic_error("a recording is under way in this thread");
  for (const auto& call : calls_) call();
}

}  // namespace qnext
