#include <chrono>
#include <cstdlib>

#include "tests/harness.h"

namespace glm5::tests {
namespace {
int failures = 0;
bool ends_at_once = false;
}

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::printf("\n  %s:%d: not so: %s\n", file, line, what.c_str());
  if (!ends_at_once) return;
  std::fflush(stdout);
  std::_Exit(1);
}

}  // namespace glm5::tests

// native_tests [--first-failure] [the beginning of tests' names]
int main(int count, char** arguments) {
  using namespace glm5::tests;
  ends_at_once = count > 1 && std::strcmp(arguments[1], "--first-failure") == 0;
  const std::string beginning = count > 1 + ends_at_once ? arguments[1 + ends_at_once] : "";
  for (const glm5::Isa isa : usable_isas()) std::printf("%s ", glm5::isa_name(isa));
  std::printf("(others: not on this machine)\n");
  int tests = 0;
  for (const Test& test : all_tests()) {
    if (test.name.compare(0, beginning.size(), beginning) != 0) continue;
    std::printf("%-40s", test.name.c_str());
    std::fflush(stdout);  // so that it is known where a sanitizer ended everything
    const auto start = std::chrono::steady_clock::now();
    test.run();
    std::printf("%5.1f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    ++tests;
  }
  std::printf("%d tests, %d failures\n", tests, failures);
  return failures != 0 || tests == 0;
}
