#include "tests/harness.h"

namespace glm5::tests {
namespace {
int failures = 0;
}

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::printf("  %s:%d: not so: %s\n", file, line, what.c_str());
}

}  // namespace glm5::tests

int main() {
  using namespace glm5::tests;
  for (const glm5::Isa isa : usable_isas()) std::printf("%s ", glm5::isa_name(isa));
  std::printf("(others: not on this machine)\n");
  for (const Test& test : all_tests()) {
    std::printf("%s\n", test.name.c_str());
    test.run();
  }
  std::printf("%zu tests, %d failures\n", all_tests().size(), failures);
  return failures != 0;
}
