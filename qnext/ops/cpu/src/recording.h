// Calls of kernels that can be made again: the same functions, on the same memory, in the same order.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace qnext {

class Recording {
 public:
  void start();  // from here on, calls of this thread are kept beside being made
  void stop();
  void replay() const;
  size_t size() const { return calls_.size(); }

 private:
  template <typename Call>
  friend void perform(Call&& call);
  static thread_local Recording* active_;
  std::vector<std::function<void()>> calls_;
};

// Makes the call, which owns everything it needs but the memory that its addresses lead to, and keeps it if this thread
// is recording. Every function of the module that computes goes through here.
template <typename Call>
void perform(Call&& call) {
  call();
  if (Recording::active_) Recording::active_->calls_.emplace_back(std::forward<Call>(call));
}

}  // namespace qnext
