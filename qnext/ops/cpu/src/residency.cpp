#include "residency.h"

#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <chrono>
#include <string>
#include <system_error>

#include "linear.h"

namespace qnext {
namespace {

constexpr int64_t kGuessesOfLayer = 2;      // as many reads as the disk has time for while nobody waits for it
constexpr double kLeastShareRight = 0.4;    // below, guesses cost more than they bring
constexpr int64_t kCallsOfTrial = 64;       // how often a guess is made that is not expected to be right
constexpr double kNewest = 1.0 / 64;        // weight of the newest observation
constexpr uint64_t kUse = 1 << 16;  // a use, so that halves of it still count

std::string reason_of(int error) {
  if (error == kDamaged) return "its checksum does not agree";
  return error == kEndOfFile ? "the file ends before it" : std::generic_category().message(error);
}

}  // namespace

RecordError::RecordError(const std::string& label, int64_t of_layer, int64_t of_expert, int error)
    : std::runtime_error(label + ", expert " + std::to_string(of_expert) + ": " + reason_of(error)), layer(of_layer),
      expert(of_expert) {}

// ---- who is wanted ----

int64_t ResidentLayer::epoch() const { return now_ / all_->sizes_.half_life; }

uint64_t ResidentLayer::load_of(int32_t expert) const {
  const Expert& e = experts_[expert];
  return e.load >> std::min<int64_t>(63, epoch() - e.epoch);
}

void ResidentLayer::count_uses(int32_t expert, int64_t uses) {
  Expert& e = experts_[expert];
  e.load = load_of(expert) + static_cast<uint64_t>(uses) * kUse;
  e.epoch = epoch();
  e.last = now_;
}

// Of two with equal loads the one that was used longer ago, and then the one with the higher number.
bool ResidentLayer::is_less_wanted(int32_t a, int32_t b) const {
  const uint64_t of_a = load_of(a), of_b = load_of(b);
  if (of_a != of_b) return of_a < of_b;
  if (experts_[a].last != experts_[b].last) return experts_[a].last < experts_[b].last;
  return a > b;
}

void ResidentLayer::keep_or_give_up(int32_t expert) {
  Expert& e = experts_[expert];
  if (static_cast<int64_t>(residents_.size()) < num_slots_) {
    residents_.push_back(expert);
  } else {
    auto last = std::min_element(residents_.begin(), residents_.end(),
                                 [&](int32_t a, int32_t b) { return is_less_wanted(a, b); });
    if (last == residents_.end() || is_less_wanted(expert, *last)) return release(expert);
    release(*last);
    *last = expert;
  }
  e.state = State::resident;
}

void ResidentLayer::release(int32_t expert) {
  Expert& e = experts_[expert];
  all_->free_.push_back(e.buffer);
  e.buffer = nullptr;
  e.state = State::absent;
  e.is_unwanted = false;
  records_[expert] = nullptr;
}

void ResidentLayer::stage(int32_t expert) {
  Expert& e = experts_[expert];
  e.state = State::staged;
  records_[expert] = e.buffer;
}

// ---- one call ----

int64_t ResidentLayer::begin(int32_t* experts, const int32_t* uses, int64_t count, int64_t num_tokens) {
  if (!misses_.empty()) all_->drain(*this);  // a call that was given up
  now_ += num_tokens;
  is_sweep_ = 2 * count >= all_->sizes_.num_experts;
  for (int64_t i = 0; i < count; ++i) {
    count_uses(experts[i], uses[i]);
    experts_[experts[i]].is_asked = true;
    experts_[experts[i]].error = 0;
  }
  all_->settle_guesses(*this);
  int32_t* end = std::stable_partition(experts, experts + count,
                                       [&](int32_t e) { return experts_[e].state == State::resident; });
  misses_.assign(end, experts + count);
  for (int64_t i = 0; i < count; ++i) experts_[experts[i]].is_asked = false;
  next_use_ = next_read_ = 0;
  const int64_t num_hits = end - experts, num_misses = count - num_hits;
  ResidencyCounts& counts = all_->counts_;
  (is_sweep_ ? counts.sweep_hits : counts.hits) += num_hits;
  (is_sweep_ ? counts.sweep_misses : counts.misses) += num_misses;
  all_->begin_reads(*this);
  return num_hits;
}

int64_t ResidentLayer::arrived(int64_t most) {
  if (next_use_ == misses_.size()) {
    misses_.clear();
    next_use_ = next_read_ = 0;
    if (!is_sweep_) all_->usual_wait_ns_ += kNewest * (static_cast<double>(waited_ns_) - all_->usual_wait_ns_);
    waited_ns_ = 0;
    return 0;
  }
  all_->collect(false);
  const auto begin = std::chrono::steady_clock::now();
  const int32_t first = misses_[next_use_];
  Expert& e = experts_[first];
  for (bool has_failed = false; e.state != State::staged;) {
    if (e.state == State::absent) {
      if (e.error != 0 && has_failed) {
        const RecordError error(file_.label, number_, first, e.error);
        all_->drain(*this);
        throw error;
      }
      has_failed = has_failed || e.error != 0;  // once more: a disk may have been asleep
      all_->find_buffer(*this);
      all_->begin_read(*this, first);
    }
    all_->collect(true);
  }
  const int64_t waited =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
  waited_ns_ += waited;
  (is_sweep_ ? all_->counts_.sweep_wait_ns : all_->counts_.wait_ns) += waited;
  int64_t count = 1;
  const int64_t left = static_cast<int64_t>(misses_.size() - next_use_);
  while (count < std::min(most, left) && experts_[misses_[next_use_ + count]].state == State::staged) ++count;
  return count;
}

void ResidentLayer::finish(int64_t count) {
  for (; count > 0; --count) keep_or_give_up(misses_[next_use_++]);
  all_->begin_reads(*this);
}

const Weight* ResidentLayer::next_router() {
  const bool helps = all_->share_right_ >= kLeastShareRight || ++all_->num_calls_ % kCallsOfTrial == 0;
  return !is_sweep_ && helps && all_->usual_wait_ns_ >= all_->sizes_.least_wait_ns ? next_router_.get() : nullptr;
}

void ResidentLayer::expect(const int32_t* experts, int64_t count) {
  if (number_ + 1 == all_->num_layers() || next_read_ < misses_.size()) return;
  ResidentLayer& next = all_->layers_[number_ + 1];
  int64_t left = kGuessesOfLayer;
  for (int64_t i = 0; i < count && left > 0 && !all_->free_.empty(); ++i) {
    if (next.experts_[experts[i]].state != State::absent) continue;
    all_->begin_guess(next, experts[i]);
    --left;
  }
}

// ---- reads ----

Residency::Residency(const ResidencySizes& sizes, std::vector<int> files, std::vector<LayerFile> layers,
                     const std::vector<int64_t>& slots, std::vector<uint8_t*> buffers,
                     std::unique_ptr<RecordReader> reader)
    : sizes_(sizes), files_(std::move(files)), layers_(layers.size()), free_(std::move(buffers)),
      reader_(std::move(reader)) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    ResidentLayer& layer = layers_[i];
    layer.all_ = this;
    layer.number_ = static_cast<int64_t>(i);
    layer.num_slots_ = slots.at(i);
    layer.file_ = std::move(layers[i]);
    layer.records_.resize(sizes.num_experts, nullptr);
    layer.experts_.resize(sizes.num_experts);
  }
}

ResidentLayer::ResidentLayer() = default;
ResidentLayer::~ResidentLayer() = default;

Residency::~Residency() {
  reader_.reset();  // waits for what is under way
  for (int file : files_) close(file);
}

Read Residency::read_of(const ResidentLayer& layer, int64_t expert, uint8_t* to) const {
  const uint64_t tag = static_cast<uint64_t>(layer.number_ * sizes_.num_experts + expert);
  return {tag, layer.file_.fd, layer.file_.offset + expert * sizes_.record_bytes, sizes_.record_bytes, to};
}

bool Residency::is_whole(const ResidentLayer& layer, int64_t expert, const uint8_t* record) const {
  return crc32(record, sizes_.record_bytes) == layer.file_.checksums[expert];
}

void Residency::begin_read(ResidentLayer& layer, int32_t expert) {
  ResidentLayer::Expert& e = layer.experts_[expert];
  assert(!free_.empty());
  e.buffer = free_.back();
  free_.pop_back();
  e.state = ResidentLayer::State::reading;
  e.error = 0;
  ++counts_.reads;
  reader_->begin(read_of(layer, expert, e.buffer));
}

void Residency::begin_reads(ResidentLayer& layer) {
  layer.next_read_ = std::max(layer.next_read_, layer.next_use_);
  for (; layer.next_read_ < layer.misses_.size() && !free_.empty(); ++layer.next_read_) {
    const int32_t expert = layer.misses_[layer.next_read_];
    if (layer.experts_[expert].state == ResidentLayer::State::absent) begin_read(layer, expert);
  }
  if (layer.is_sweep_ && layer.next_read_ == layer.misses_.size()) guess_next_of(layer);
}

void Residency::guess_next_of(const ResidentLayer& layer) {
  if (layer.number_ + 1 == num_layers()) return;
  ResidentLayer& next = layers_[layer.number_ + 1];
  for (int32_t expert = 0; expert < sizes_.num_experts && !free_.empty(); ++expert) {
    if (next.experts_[expert].state == ResidentLayer::State::absent) begin_guess(next, expert);
  }
}

void Residency::begin_guess(ResidentLayer& layer, int32_t expert) {
  guesses_.emplace_back(layer.number_, expert);
  ++counts_.guesses;
  begin_read(layer, expert);
}

// Whatever was guessed, and is not among what `layer` is asked for, gives its memory back.
void Residency::settle_guesses(const ResidentLayer& layer) {
  for (const auto& [number, expert] : guesses_) {
    ResidentLayer& guessed = layers_[number];
    ResidentLayer::Expert& e = guessed.experts_[expert];
    const bool is_right = number == layer.number_ && e.is_asked;
    if (is_right && e.state != ResidentLayer::State::absent) ++counts_.guesses_used;
    if (!layer.is_sweep_) share_right_ += kNewest * ((is_right ? 1.0 : 0.0) - share_right_);
    if (!is_right && e.state == ResidentLayer::State::staged) guessed.release(expert);
    e.is_unwanted = !is_right && e.state == ResidentLayer::State::reading;
  }
  guesses_.clear();
}

// There is a free buffer afterwards: what was guessed gives way, then the expert of this call that is used last.
void Residency::find_buffer(ResidentLayer& layer) {
  if (free_.empty()) settle_guesses(layer);
  while (free_.empty() && reader_->num_under_way() > 0) collect(true);
  for (size_t i = layer.misses_.size(); free_.empty() && i > layer.next_use_;) {
    const int32_t expert = layer.misses_[--i];
    if (layer.experts_[expert].state != ResidentLayer::State::staged) continue;
    layer.release(expert);
    layer.next_read_ = std::min(layer.next_read_, i);
  }
}

void Residency::collect(bool wait) {
  Done done[32];
  const size_t count = reader_->collect(done, 32, wait);
  for (size_t i = 0; i < count; ++i) {
    const auto expert = static_cast<int32_t>(done[i].tag % sizes_.num_experts);
    ResidentLayer& layer = layers_[done[i].tag / sizes_.num_experts];
    ResidentLayer::Expert& e = layer.experts_[expert];
    if (done[i].error == 0 && !e.is_unwanted && !is_whole(layer, expert, e.buffer)) done[i].error = kDamaged;
    e.error = done[i].error;
    if (e.is_unwanted || e.error != 0)
      layer.release(expert);
    else
      layer.stage(expert);
  }
}

// After a call that failed: nothing is under way or staged.
void Residency::drain(ResidentLayer& layer) {
  while (reader_->num_under_way() > 0) collect(true);
  guesses_.clear();
  for (ResidentLayer& each : layers_)
    for (int32_t expert = 0; expert < sizes_.num_experts; ++expert)
      if (each.experts_[expert].state == ResidentLayer::State::staged) each.release(expert);
  layer.misses_.clear();
  layer.next_use_ = layer.next_read_ = 0;
}

// ---- from outside of a step ----

std::vector<std::pair<int32_t, uint64_t>> Residency::ranked(const ResidentLayer& layer, std::vector<int32_t> experts) {
  std::sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return layer.is_less_wanted(b, a); });
  std::vector<std::pair<int32_t, uint64_t>> found;
  for (int32_t expert : experts) found.emplace_back(expert, layer.load_of(expert));
  return found;
}

std::vector<std::pair<int32_t, uint64_t>> Residency::residents(int64_t number) const {
  return ranked(layers_.at(number), layers_.at(number).residents_);
}

std::vector<std::pair<int32_t, uint64_t>> Residency::others(int64_t number) const {
  const ResidentLayer& layer = layers_.at(number);
  std::vector<int32_t> experts;
  for (int32_t expert = 0; expert < sizes_.num_experts; ++expert)
    if (layer.experts_[expert].state != ResidentLayer::State::resident && layer.load_of(expert) > 0)
      experts.push_back(expert);
  return ranked(layer, std::move(experts));
}

int64_t Residency::fill(int64_t number, const std::vector<std::pair<int32_t, uint64_t>>& experts) {
  ResidentLayer& layer = layers_.at(number);
  std::vector<int32_t> asked;
  for (const auto& [expert, load] : experts) {
    if (layer.experts_.at(expert).state != ResidentLayer::State::absent) continue;
    layer.experts_[expert].load = load;
    layer.experts_[expert].epoch = layer.epoch();
    const int64_t room = layer.num_slots_ - static_cast<int64_t>(layer.residents_.size() + asked.size());
    if (room <= 0 || free_.empty()) continue;
    asked.push_back(expert);
    begin_read(layer, expert);
  }
  while (reader_->num_under_way() > 0) collect(true);
  int64_t count = 0;
  for (int32_t expert : asked) {
    if (layer.experts_[expert].state != ResidentLayer::State::staged) continue;
    layer.keep_or_give_up(expert);
    ++count;
  }
  return count;
}

void Residency::look_ahead(int64_t number, const Weight& router) {
  layers_.at(number).next_router_ = std::make_unique<Weight>(router);
}

void Residency::clear() {
  for (ResidentLayer& layer : layers_) {
    drain(layer);
    for (int32_t expert : layer.residents_) layer.release(expert);
    layer.residents_.clear();
    layer.experts_.assign(layer.experts_.size(), {});
    layer.now_ = 0;
  }
}

void Residency::read(int64_t number, int64_t expert, uint8_t* to) const {
  const ResidentLayer& layer = layers_.at(number);
  if (expert < 0 || expert >= sizes_.num_experts) throw std::out_of_range("no such expert");
  int error = read_at_once(read_of(layer, expert, to));
  if (error == 0 && !is_whole(layer, expert, to)) error = kDamaged;
  if (error != 0) throw RecordError(layer.file_.label, number, expert, error);
}

}  // namespace qnext
