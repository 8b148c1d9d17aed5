#include "record_reader.h"

#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <atomic>
#include <cstring>
#endif

namespace qnext {

int read_at_once(const Read& read) {
  for (int64_t done = 0; done < read.num_bytes;) {
    const ssize_t got = pread(read.fd, read.to + done, read.num_bytes - done, read.offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kEndOfFile;
    done += got;
  }
  return 0;
}

namespace {

class ThreadReader final : public RecordReader {
 public:
  explicit ThreadReader(unsigned count) {
    for (unsigned i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadReader() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_ending_ = true;
    }
    has_work_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void begin(const Read& read) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(read);
    }
    ++num_under_way_;
    has_work_.notify_one();
  }

  size_t collect(Done* done, size_t most, bool wait) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (wait && num_under_way_ > 0) has_ended_.wait(lock, [&] { return !ended_.empty(); });
    size_t count = 0;
    for (; count < most && !ended_.empty(); ++count) {
      done[count] = ended_.front();
      ended_.pop_front();
    }
    num_under_way_ -= count;
    return count;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      has_work_.wait(lock, [&] { return is_ending_ || !waiting_.empty(); });
      if (is_ending_) return;
      const Read read = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      const int error = read_at_once(read);
      lock.lock();
      ended_.push_back({read.tag, error});
      has_ended_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_work_, has_ended_;
  std::deque<Read> waiting_;
  std::deque<Done> ended_;
  bool is_ending_ = false;
  std::vector<std::thread> threads_;
};

#if defined(__linux__)

[[noreturn]] void refuse(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

class Mapping {
 public:
  Mapping(int fd, size_t num_bytes, off_t offset) : num_bytes_(num_bytes) {
    data_ = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (data_ == MAP_FAILED) refuse("io_uring memory");
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(data_, num_bytes_); }

  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + offset);
  }

 private:
  void* data_;
  size_t num_bytes_;
};

// Closes the ring after its memory is gone.
struct RingFile {
  int fd;
  explicit RingFile(int opened) : fd(opened) {}
  RingFile(const RingFile&) = delete;
  RingFile& operator=(const RingFile&) = delete;
  ~RingFile() { close(fd); }
};

class RingReader final : public RecordReader {
 public:
  explicit RingReader(unsigned depth) : file_(set_up(depth, parameters_)) {
    const auto& p = parameters_;
    const bool is_single = p.features & IORING_FEAT_SINGLE_MMAP;
    const size_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    const size_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
    sq_ = std::make_unique<Mapping>(file_.fd, is_single && cq_bytes > sq_bytes ? cq_bytes : sq_bytes, IORING_OFF_SQ_RING);
    if (!is_single) cq_ = std::make_unique<Mapping>(file_.fd, cq_bytes, IORING_OFF_CQ_RING);
    entries_ = std::make_unique<Mapping>(file_.fd, p.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    const Mapping& cq = cq_ ? *cq_ : *sq_;
    sq_tail_ = sq_->at<uint32_t>(p.sq_off.tail);
    sq_mask_ = *sq_->at<uint32_t>(p.sq_off.ring_mask);
    sq_array_ = sq_->at<uint32_t>(p.sq_off.array);
    cq_head_ = cq.at<uint32_t>(p.cq_off.head);
    cq_tail_ = cq.at<uint32_t>(p.cq_off.tail);
    cq_mask_ = *cq.at<uint32_t>(p.cq_off.ring_mask);
    completions_ = cq.at<io_uring_cqe>(p.cq_off.cqes);
    flights_.resize(p.sq_entries);
    for (uint32_t i = 0; i < p.sq_entries; ++i) free_.push_back(i);
  }

  // Nothing may write into memory that somebody else has by then.
  ~RingReader() override {
    Done done[16];
    waiting_.clear();
    while (num_in_kernel_ > 0) collect(done, 16, true);
  }

  void begin(const Read& read) override {
    ++num_under_way_;
    waiting_.push_back(read);
    submit_waiting();
  }

  size_t collect(Done* done, size_t most, bool wait) override {
    size_t count = 0;
    for (;;) {
      submit_waiting();
      count += reap(done + count, most - count);
      if (count == most || count > 0 || !wait || num_under_way_ == 0) break;
      enter(0, 1);
    }
    num_under_way_ -= count;
    return count;
  }

 private:
  struct Flight {
    Read read;
    int64_t done;
  };

  static int set_up(unsigned depth, io_uring_params& parameters) {
    memset(&parameters, 0, sizeof parameters);
    const long fd = syscall(__NR_io_uring_setup, depth, &parameters);
    if (fd < 0) refuse("io_uring");
    return static_cast<int>(fd);
  }

  void enter(unsigned to_submit, unsigned to_wait) {
    const unsigned flags = to_wait ? IORING_ENTER_GETEVENTS : 0;
    do {
      const long taken = syscall(__NR_io_uring_enter, file_.fd, to_submit, to_wait, flags, nullptr, 0);
      if (taken < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) refuse("io_uring");
      if (taken < 0 && to_submit == 0) return;  // a signal: the caller looks and waits again
      if (taken > 0) to_submit -= static_cast<unsigned>(taken);
    } while (to_submit > 0);
  }

  void submit_waiting() {
    unsigned count = 0;
    for (; !waiting_.empty() && !free_.empty(); ++count) {
      const uint32_t number = free_.back();
      free_.pop_back();
      flights_[number] = {waiting_.front(), 0};
      waiting_.pop_front();
      put(number);
    }
    if (count) enter(count, 0);
  }

  void put(uint32_t number) {
    const Flight& flight = flights_[number];
    io_uring_sqe* entry = entries_->at<io_uring_sqe>(0) + number;
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READ;
    entry->fd = flight.read.fd;
    entry->off = flight.read.offset + flight.done;
    entry->addr = reinterpret_cast<uint64_t>(flight.read.to + flight.done);
    entry->len = static_cast<uint32_t>(flight.read.num_bytes - flight.done);
    entry->user_data = number;
    const uint32_t tail = *sq_tail_;
    sq_array_[tail & sq_mask_] = number;
    std::atomic_ref<uint32_t>(*sq_tail_).store(tail + 1, std::memory_order_release);
    ++num_in_kernel_;
  }

  size_t reap(Done* done, size_t most) {
    size_t count = 0;
    uint32_t head = *cq_head_;
    while (count < most && head != std::atomic_ref<uint32_t>(*cq_tail_).load(std::memory_order_acquire)) {
      const io_uring_cqe& completion = completions_[head & cq_mask_];
      const uint32_t number = static_cast<uint32_t>(completion.user_data);
      const int32_t result = completion.res;
      std::atomic_ref<uint32_t>(*cq_head_).store(++head, std::memory_order_release);
      --num_in_kernel_;
      Flight& flight = flights_[number];
      if (result > 0) flight.done += result;
      if (result == -EINTR || result == -EAGAIN || (result > 0 && flight.done < flight.read.num_bytes)) {
        put(number);
        enter(1, 0);
        continue;
      }
      done[count++] = {flight.read.tag, result < 0 ? -result : result == 0 ? kEndOfFile : 0};
      free_.push_back(number);
    }
    return count;
  }

  io_uring_params parameters_;
  RingFile file_;
  std::unique_ptr<Mapping> sq_, cq_, entries_;
  uint32_t *sq_tail_, *sq_array_, *cq_head_, *cq_tail_;
  uint32_t sq_mask_, cq_mask_;
  io_uring_cqe* completions_;
  std::vector<Flight> flights_;
  std::vector<uint32_t> free_;
  std::deque<Read> waiting_;
  size_t num_in_kernel_ = 0;
};

#endif

}  // namespace

std::unique_ptr<RecordReader> make_thread_reader(unsigned num_threads) {
  return std::make_unique<ThreadReader>(num_threads);
}

std::unique_ptr<RecordReader> make_ring_reader(unsigned depth) {
#if defined(__linux__)
  return std::make_unique<RingReader>(depth);
#else
  throw std::system_error(ENOSYS, std::generic_category(), "io_uring");
#endif
}

}  // namespace qnext
