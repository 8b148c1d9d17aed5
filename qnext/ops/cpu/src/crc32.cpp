#include <array>
#include <cstring>

#include "pool.h"
#include "record_reader.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qnext {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // reflected
constexpr int64_t kSharedPart = 128 << 10;     // bytes that one thread takes at a time

constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
    tables[0][i] = value;
  }
  for (uint32_t i = 0; i < 256; ++i)
    for (int t = 1; t < 8; ++t) tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 255];
  return tables;
}

constexpr auto kTables = make_tables();

// Eight bytes at a time by tables. `state` is the inverted checksum, before and after.
uint32_t by_tables(uint32_t state, const uint8_t* bytes, int64_t count) {
  for (; count >= 8; bytes += 8, count -= 8) {
    uint32_t low, high;
    memcpy(&low, bytes, 4);
    memcpy(&high, bytes + 4, 4);
    low ^= state;
    state = kTables[7][low & 255] ^ kTables[6][(low >> 8) & 255] ^ kTables[5][(low >> 16) & 255] ^
            kTables[4][low >> 24] ^ kTables[3][high & 255] ^ kTables[2][(high >> 8) & 255] ^
            kTables[1][(high >> 16) & 255] ^ kTables[0][high >> 24];
  }
  for (; count > 0; ++bytes, --count) state = (state >> 8) ^ kTables[0][(state ^ *bytes) & 255];
  return state;
}

#if defined(__x86_64__)

// x ** n modulo the polynomial, reflected, as carry-less products by 64-bit halves want it.
constexpr uint64_t power_of_x(int n) {
  uint32_t value = 0x80000000;  // 1
  for (int i = 0; i < n; ++i) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
  return static_cast<uint64_t>(value) << 1;
}

#define QNEXT_CLMUL __attribute__((target("pclmul,sse4.1")))

QNEXT_CLMUL inline __m128i fold(__m128i sum, __m128i next, __m128i powers) {
  return _mm_xor_si128(next, _mm_xor_si128(_mm_clmulepi64_si128(sum, powers, 0x00),
                                           _mm_clmulepi64_si128(sum, powers, 0x11)));
}

// Sixteen bytes stand for a polynomial; moving it over the next ones multiplies its halves by powers of x. What is left
// of that, sixteen bytes with the same remainder, goes through the tables.
QNEXT_CLMUL uint32_t by_products(uint32_t state, const uint8_t* bytes, int64_t count) {
  const auto load = [](const uint8_t* p) __attribute__((target("sse4.1"))) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  const __m128i over_64 = _mm_set_epi64x(power_of_x(4 * 128 - 32), power_of_x(4 * 128 + 32));
  const __m128i over_16 = _mm_set_epi64x(power_of_x(128 - 32), power_of_x(128 + 32));
  __m128i sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = load(bytes + 16 * i);
  sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  for (bytes += 64, count -= 64; count >= 64; bytes += 64, count -= 64)
    for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], load(bytes + 16 * i), over_64);
  __m128i sum = sums[0];
  for (int i = 1; i < 4; ++i) sum = fold(sum, sums[i], over_16);
  uint8_t rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), sum);
  return by_tables(by_tables(0, rest, 16), bytes, count);
}

#endif

// a * b modulo the polynomial, reflected.
uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a != 0; a <<= 1) {
    if (a & 0x80000000) sum ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return sum;
}

// x ** (8 * count): what a checksum is multiplied with when so many bytes follow.
uint32_t shift_of(int64_t count) {
  uint32_t power = 0x80000000 >> 8, result = 0x80000000;  // x ** 8, and 1
  for (; count > 0; count >>= 1, power = product(power, power))
    if (count & 1) result = product(result, power);
  return result;
}

uint32_t checksum(const uint8_t* bytes, int64_t count) {
#if defined(__x86_64__)
  static const bool has_products = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (has_products && count >= 64) return ~by_products(~0u, bytes, count);
#endif
  return ~by_tables(~0u, bytes, count);
}

}  // namespace

uint32_t crc32(const uint8_t* bytes, int64_t count) {
  if (count <= kSharedPart) return checksum(bytes, count);
  constexpr int64_t kMostParts = 64;
  const int64_t part = kSharedPart * ((count + kMostParts * kSharedPart - 1) / (kMostParts * kSharedPart));
  const int64_t num_parts = (count + part - 1) / part;
  uint32_t sums[kMostParts];
  parallel_for(num_parts, [&](int64_t i) {
    sums[i] = checksum(bytes + i * part, i + 1 < num_parts ? part : count - i * part);
  });
  const uint32_t shift = shift_of(part);
  uint32_t sum = sums[0];
  for (int64_t i = 1; i + 1 < num_parts; ++i) sum = product(sum, shift) ^ sums[i];
  return product(sum, shift_of(count - (num_parts - 1) * part)) ^ sums[num_parts - 1];
}

}  // namespace qnext
