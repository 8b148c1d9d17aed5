#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qnext {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds, before another thread may have the core
// Workers stay awake for the gap between two steps of a decoding: waking up takes as long as a small step.
constexpr auto kAwake = std::chrono::microseconds(300);
constexpr int kSpinsPerLook = 256;
constexpr int kScratchSlots = 32;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
};

class Pool {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> owner(use_);
    stop_workers();
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
  }

  int size() const { return 1 + static_cast<int>(workers_.size()); }

  void run(int64_t num_tasks, void (*body)(void*, int64_t), void* context) {
    if (num_tasks > 1 && !workers_.empty() && !in_task_ && use_.try_lock()) {
      std::lock_guard<std::mutex> owner(use_, std::adopt_lock);
      share(Job{body, context, num_tasks});
    } else {
      for (int64_t task = 0; task < num_tasks; ++task) body(context, task);
    }
  }

  static void keep_to_oneself() { in_task_ = true; }

  // After fork only the forking thread lives on.
  void forget_workers() {
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    new (&use_) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
  }

  ~Pool() { stop_workers(); }

 private:
  void share(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    in_task_ = true;
    take_tasks();
    in_task_ = false;
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
      relax();
      if (spins > kSpins) std::this_thread::yield();
    }
  }

  void take_tasks() {
    for (;;) {
      int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.num_tasks) return;
      job_.body(job_.context, task);
    }
  }

  void work() {
    in_task_ = true;
    for (uint64_t seen = start_generation_;;) {
      seen = wait_beyond(seen);
      if (stopping_.load(std::memory_order_acquire)) return;
      take_tasks();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t wait_beyond(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    do {
      for (int spins = 0; spins < kSpinsPerLook; ++spins) {
        uint64_t now = generation_.load(std::memory_order_acquire);
        if (now != seen) return now;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_);
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return generation_.load(std::memory_order_acquire);
  }

  void stop_workers() {
    stopping_.store(true, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1, std::memory_order_seq_cst);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false, std::memory_order_release);
    start_generation_ = generation_.load();
  }

  std::mutex use_;  // held by the thread whose job the workers do
  Job job_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  uint64_t start_generation_ = 0;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  static thread_local bool in_task_;
};

thread_local bool Pool::in_task_ = false;

// Never destroyed: workers may outlive static destructors at exit.
Pool& pool() {
  static Pool* instance = [] {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forget_workers(); });
    return made;
  }();
  return *instance;
}

// Memory that grows and stays. Large memory is mapped: what was too small goes back to the system then, instead of
// becoming a hole of hundreds of MB in the heap.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  void* at_least(int64_t bytes) {
    if (bytes <= bytes_) return data_;
    release();
    if (bytes < kMapped) {
      data_ = aligned_alloc(64, (bytes + 63) / 64 * 64);
    } else {
      data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data_ == MAP_FAILED) data_ = nullptr;
#if defined(MADV_HUGEPAGE)
      if (data_ != nullptr) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
    return data_;
  }

 private:
  static constexpr int64_t kMapped = 1 << 20;

  void release() {
    if (bytes_ < kMapped)
      free(data_);
    else
      munmap(data_, bytes_);
    data_ = nullptr;
    bytes_ = 0;
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace

void run_tasks(int64_t num_tasks, void (*body)(void*, int64_t), void* context) { pool().run(num_tasks, body, context); }

void set_num_threads(int count) {
  if (count != pool().size()) pool().resize(count);
}

int num_threads() { return pool().size(); }

void compute_alone() { Pool::keep_to_oneself(); }

void* scratch(int slot, int64_t bytes) {
  static thread_local Scratch slots[kScratchSlots];
  return slots[slot].at_least(bytes);
}

}  // namespace qnext
