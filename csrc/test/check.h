// The least a test needs: say what failed and where, and exit.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

// Runs one test function and names it.
#define RUN(test)                  \
  do {                             \
    test();                        \
    std::printf("  %s\n", #test);  \
    std::fflush(stdout);           \
  } while (false)
