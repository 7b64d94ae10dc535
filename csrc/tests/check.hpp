// A test runner of one screen: TEST(name) { CHECK(...); CHECK_THROWS(Type, expression); }
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline char context[64] = "";  // printed with a failure, e.g. the seed

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: failed: %s %s\n", file, line, what, context);
  std::fflush(stderr);
  std::_Exit(1);  // also out of a forked child
}

// Runs the tests whose name contains the first argument, or all.
inline int run(int argc, char** argv) {
  for (const Test& test : tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, error.what());
    }
  }
  return 0;
}

}  // namespace check

#define TEST(name)                                               \
  static void name();                                            \
  static const check::Registration register_##name{#name, name}; \
  static void name()
#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)
#define CHECK_THROWS(Type, expression)                                       \
  do {                                                                       \
    bool thrown = false;                                                     \
    try {                                                                    \
      static_cast<void>(expression);                                         \
    } catch (const Type&) {                                                  \
      thrown = true;                                                         \
    }                                                                        \
    if (!thrown) check::fail(__FILE__, __LINE__, #expression ": no " #Type); \
  } while (false)
