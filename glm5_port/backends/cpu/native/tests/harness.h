// Tests of the kernels in C++, for the sanitizers: buffers end where they must, so that one byte read or written beyond is seen.
// A file of tests registers functions with TEST(name) { ... CHECK(condition) ... }.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "numbers.h"

namespace glm5::tests {

struct Test {
  std::string name;
  std::function<void()> run;
};
std::vector<Test>& all_tests();
void fail(const char* file, int line, const std::string& what);

struct Register {
  Register(const char* name, std::function<void()> run) { all_tests().push_back({name, std::move(run)}); }
};

#define TEST(name)                                                    \
  static void test_##name();                                          \
  static const ::glm5::tests::Register register_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(condition) \
  if (!(condition)) ::glm5::tests::fail(__FILE__, __LINE__, #condition)

// What this machine can run, the specification first.
inline std::vector<Isa> usable_isas() {
  std::vector<Isa> found;
  for (int i = 0; i < isa_count; ++i)
    if (isa_missing(static_cast<Isa>(i))[0] == 0) found.push_back(static_cast<Isa>(i));
  return found;
}

// Heap memory of exactly `count` elements, `shift` elements past an aligned address: the sanitizer guards both ends.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t count, int64_t shift = 0) : memory_(count + shift), data_(memory_.data() + shift), count_(count) {}
  Exact(Exact&&) = default;  // a copy would point into the memory of the other
  Exact& operator=(Exact&&) = default;
  T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }
  bool operator==(const Exact& other) const {
    return count_ == other.count_ && (count_ == 0 || std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0);
  }

 private:
  std::vector<T> memory_;
  T* data_;
  int64_t count_;
};

// Elements from the first to the last of `rows` rows of `width`, `stride` apart.
inline int64_t extent(int64_t rows, int64_t stride, int64_t width) { return rows ? (rows - 1) * stride + width : 0; }

inline void fill_normal(const Exact<float>& values, std::mt19937& random, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = normal(random);
}
inline void fill_normal(const Exact<bf16>& values, std::mt19937& random, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = round_to_bf16(normal(random));
}

// Whole numbers from -most to most: products and sums of them are exact in every format and in any order, so results must be equal.
template <class T>
void fill_whole(const Exact<T>& values, std::mt19937& random, int most) {
  std::uniform_int_distribution<int> whole(-most, most);
  for (int64_t i = 0; i < values.size(); ++i) narrow(static_cast<float>(whole(random)), &values[i]);
}

// Equal numbers; zeros of both signs are equal, and so is every NaN.
inline bool same_numbers(const Exact<float>& a, const Exact<float>& b) {
  for (int64_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return a.size() == b.size();
}

}  // namespace glm5::tests
