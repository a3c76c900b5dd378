// SPDX-License-Identifier: MIT

// perdita.hpp includes every public header: what lies beside it must have been compiled into this
// program, which each header shows by a declaration of its own.

#include <perdita/perdita.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

// The header's own path, through the include path that the compiler used.
#if !__has_include(<perdita/perdita.hpp>)
#error "no perdita/perdita.hpp"
#endif

int main(int, char**) {
  namespace fs = std::filesystem;
  const fs::path here = fs::absolute(__FILE__).parent_path();
  const fs::path headers = here / "../../include/perdita";
  std::ifstream file(headers / "perdita.hpp");
  const std::string umbrella((std::istreambuf_iterator<char>(file)), {});
  int missing = 0, seen = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(headers)) {
    const std::string name = entry.path().filename().string();
    if (entry.path().extension() != ".hpp" || name == "perdita.hpp" || name == "config.hpp")
      continue;
    ++seen;
    if (umbrella.find("#include \"" + name + "\"") == umbrella.npos) {
      std::printf("perdita.hpp does not include %s\n", name.c_str());
      ++missing;
    }
  }
  std::printf("%d headers, %d missing\n", seen, missing);
  // What it includes must also be there to be used together.
  (void)perdita::cross_entropy<float>();
  (void)perdita::ldr_kl<float>();
  (void)perdita::z_loss<float>();
  (void)perdita::sparsemax_loss<float>();
  (void)perdita::linear(perdita::cross_entropy<float>());
  return missing > 0 || seen < 5;
}
