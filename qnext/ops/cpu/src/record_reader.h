// Reading records of experts from files: several at once, without Python, on a ring of the kernel or on threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qnext {

struct Read {
  uint64_t tag;
  int fd;
  int64_t offset, num_bytes;
  uint8_t* to;
};

struct Done {
  uint64_t tag;
  int error;  // 0, or what the system said; kEndOfFile where the file ends before the record does
};

constexpr int kEndOfFile = -1;

// On the calling thread: 0, an errno, or kEndOfFile.
int read_at_once(const Read& read);

// Used by one thread at a time.
class RecordReader {
 public:
  virtual ~RecordReader() = default;
  // Begins a read. The memory belongs to the reader until `collect` has named the tag.
  virtual void begin(const Read& read) = 0;
  // Up to `most` reads that have ended; waits for one if `wait` and there is any under way. How many.
  virtual size_t collect(Done* done, size_t most, bool wait) = 0;
  size_t num_under_way() const { return num_under_way_; }

 protected:
  size_t num_under_way_ = 0;
};

// Both throw std::system_error where the system refuses.
std::unique_ptr<RecordReader> make_ring_reader(unsigned depth);
std::unique_ptr<RecordReader> make_thread_reader(unsigned num_threads);

// The CRC-32 of zlib and of Ethernet; threads share the bytes.
uint32_t crc32(const uint8_t* bytes, int64_t count);

}  // namespace qnext
