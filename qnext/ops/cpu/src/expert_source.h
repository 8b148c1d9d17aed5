// Where a kernel gets experts from that are not all in memory.
//
// Kernels are compiled once per instruction set, so this names no class of the standard library: its inline functions
// would be compiled so as well, and the linker keeps one of them for all.
#pragma once

#include <cstdint>

namespace qnext {

struct Weight;

// The experts of one layer. A kernel calls `begin`, computes those in memory, then alternates `arrived` and `finish`.
class ExpertSource {
 public:
  // Sorts `experts` (ascending, each once, with the number of its uses by `num_tokens` tokens): those in memory first.
  // How many they are. Begins to read the others.
  virtual int64_t begin(int32_t* experts, const int32_t* uses, int64_t count, int64_t num_tokens) = 0;
  // How many of the next experts have come: at least one, at most `most`, 0 when none is left. Throws where one cannot
  // be had, and the call is over then.
  virtual int64_t arrived(int64_t most) = 0;
  // The next `count` experts have been used: their memory may go to others.
  virtual void finish(int64_t count) = 0;
  // The router of the next layer where a look at it would help: what it says of this layer's input is mostly what it
  // will say of its own. Or null.
  virtual const Weight* next_router() = 0;
  // Experts that the next layer is likely to need, the likeliest first. After `begin`.
  virtual void expect(const int32_t* experts, int64_t count) = 0;

 protected:
  ~ExpertSource() = default;
};

}  // namespace qnext
