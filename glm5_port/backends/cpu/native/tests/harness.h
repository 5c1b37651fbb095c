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
  T* data() { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  bool operator==(const Exact& other) const {
    return count_ == other.count_ && (count_ == 0 || std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0);
  }

 private:
  std::vector<T> memory_;
  T* data_;
  int64_t count_;
};

inline void fill_normal(Exact<float>& values, std::mt19937& random, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = normal(random);
}
inline void fill_normal(Exact<bf16>& values, std::mt19937& random, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = round_to_bf16(normal(random));
}

}  // namespace glm5::tests
