// Which experts of a model are in memory, and how the others come from disk while a step is computed.
//
// Memory is a set of equal buffers, one record each. Each layer keeps at most a number of experts, its slots; the other
// buffers are for reads under way. What is kept is decided from integers, in an order that does not depend on the speed
// of the disk: qnext/residency/policy.py says the same in Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "expert_source.h"
#include "record_reader.h"

namespace qnext {

constexpr int kDamaged = -2;  // beside the errors of a read: the checksum does not agree

struct RecordError : std::runtime_error {
  RecordError(const std::string& label, int64_t layer, int64_t expert, int error);
  int64_t layer, expert;
};

struct LayerFile {
  std::string label;  // what messages call it
  int fd;
  int64_t offset;                   // of the first record
  std::vector<uint32_t> checksums;  // of each record
};

struct ResidencySizes {
  int64_t num_experts, record_bytes;
  int64_t half_life;      // tokens after which a use counts half
  int64_t least_wait_ns;  // of a call on average, from which on a guess is made of what the next layer needs
};

// What was asked for and what it took, in numbers of experts. A sweep is a call that needs half of a layer or more: a
// long prompt. A guess is a read for the next layer before its router has spoken.
struct ResidencyCounts {
  std::atomic<int64_t> hits{0}, misses{0}, sweep_hits{0}, sweep_misses{0};
  std::atomic<int64_t> reads{0}, guesses{0}, guesses_used{0};
  std::atomic<int64_t> wait_ns{0}, sweep_wait_ns{0};
};

class Residency;

// The experts of one layer. A call that throws RecordError is over, and the next one begins anew.
class ResidentLayer final : public ExpertSource {
 public:
  ResidentLayer();
  ~ResidentLayer();
  int64_t begin(int32_t* experts, const int32_t* uses, int64_t count, int64_t num_tokens) override;
  int64_t arrived(int64_t most) override;
  void finish(int64_t count) override;
  const Weight* next_router() override;
  void expect(const int32_t* experts, int64_t count) override;

  const uint8_t* const* records() const { return records_.data(); }  // [num_experts]; the array stays where it is

 private:
  friend class Residency;
  enum class State : uint8_t { absent, reading, staged, resident };

  struct Expert {
    State state = State::absent;
    bool is_asked = false;     // by the call under way
    bool is_unwanted = false;  // a wrong guess that is still being read
    int error = 0;             // of the last read
    uint8_t* buffer = nullptr;
    uint64_t load = 0;  // uses, halved once every half life
    int64_t epoch = 0;  // up to which they are halved
    int64_t last = -1;  // the time of the last use
  };

  int64_t epoch() const;
  uint64_t load_of(int32_t expert) const;
  bool is_less_wanted(int32_t a, int32_t b) const;
  void count_uses(int32_t expert, int64_t uses);
  void keep_or_give_up(int32_t expert);
  void release(int32_t expert);
  void stage(int32_t expert);

  Residency* all_ = nullptr;
  std::unique_ptr<Weight> next_router_;
  int64_t number_ = 0, num_slots_ = 0;
  int64_t now_ = 0;        // tokens that this layer has seen
  int64_t waited_ns_ = 0;  // in the call under way
  LayerFile file_;
  std::vector<const uint8_t*> records_;  // of experts that are staged or resident
  std::vector<Expert> experts_;
  std::vector<int32_t> residents_;
  std::vector<int32_t> misses_;  // of the call under way, in the order in which they are used
  size_t next_use_ = 0, next_read_ = 0;
  bool is_sweep_ = false;
};

class Residency {
 public:
  // `slots` experts of each layer stay. There are more `buffers` than slots in all. Takes the files.
  Residency(const ResidencySizes& sizes, std::vector<int> files, std::vector<LayerFile> layers,
            const std::vector<int64_t>& slots, std::vector<uint8_t*> buffers, std::unique_ptr<RecordReader> reader);
  ~Residency();
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  ResidentLayer& layer(int64_t number) { return layers_.at(number); }
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const ResidencyCounts& counts() const { return counts_; }

  // The residents of a layer with their loads, the most wanted first.
  std::vector<std::pair<int32_t, uint64_t>> residents(int64_t layer) const;
  // The others that have a load, the most wanted first.
  std::vector<std::pair<int32_t, uint64_t>> others(int64_t layer) const;
  // Gives experts such loads, and reads them into empty slots of a layer as far as there are any. Passes over what cannot
  // be read. How many it read.
  int64_t fill(int64_t layer, const std::vector<std::pair<int32_t, uint64_t>>& experts);
  // What routes the tokens of the layer after this one. Its memory has to stay.
  void look_ahead(int64_t layer, const Weight& router);
  // Between two steps: no expert is in memory any more, and none has a load.
  void clear();
  // One record, checked, into memory of the caller, aligned as its file asks. From any thread. Throws RecordError.
  void read(int64_t layer, int64_t expert, uint8_t* to) const;

 private:
  friend class ResidentLayer;
  void begin_read(ResidentLayer& layer, int32_t expert);
  void begin_reads(ResidentLayer& layer);
  void begin_guess(ResidentLayer& layer, int32_t expert);
  void guess_next_of(const ResidentLayer& layer);
  void settle_guesses(const ResidentLayer& layer);
  void find_buffer(ResidentLayer& layer);
  void collect(bool wait);
  void drain(ResidentLayer& layer);
  static std::vector<std::pair<int32_t, uint64_t>> ranked(const ResidentLayer& layer, std::vector<int32_t> experts);
  Read read_of(const ResidentLayer& layer, int64_t expert, uint8_t* to) const;
  bool is_whole(const ResidentLayer& layer, int64_t expert, const uint8_t* record) const;

  ResidencySizes sizes_;
  std::vector<int> files_;
  std::vector<ResidentLayer> layers_;
  std::vector<uint8_t*> free_;
  std::unique_ptr<RecordReader> reader_;
  ResidencyCounts counts_;
  std::vector<std::pair<int64_t, int32_t>> guesses_;  // layers and experts
  double share_right_ = 1.0;                           // of the last guesses
  double usual_wait_ns_ = 0.0;                         // of a call that is no sweep
  int64_t num_calls_ = 0;
};

}  // namespace qnext
