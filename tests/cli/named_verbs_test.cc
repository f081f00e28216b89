// Every `heddle VERB` that an advice or an error names is one that the program has.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

namespace fs = std::filesystem;

fs::path Root() {
  const char* root = getenv("HEDDLE_SOURCE_DIR");
  return root == nullptr ? fs::current_path() : fs::path(root);
}

std::string ReadAll(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// The program's verbs, "node ls", and the first words of those that have two, "node".
struct Known {
  std::set<std::string> verbs;
  std::set<std::string> groups;
  Known() {
    for (const Verb& verb : AllVerbs()) {
      verbs.insert(verb.path.size() == 2 ? verb.path[0] + " " + verb.path[1] : verb.path[0]);
      if (verb.path.size() == 2) groups.insert(verb.path[0]);
    }
  }
};

// The text of all literals, with those that the compiler joins made one.
std::string Literals(const std::string& source) {
  static const std::regex literal(R"re("((?:\\.|[^"\\\n])*)"(\s*(?="))?)re");
  std::string all;
  for (std::sregex_iterator it(source.begin(), source.end(), literal), end; it != end; ++it) {
    all += (*it)[1].str() + ((*it)[2].matched ? "" : "\n");
  }
  return all;
}

// Commands in `text`: after a mark or word that introduces one, since prose speaks of heddle too.
// `anywhere`: all of `text` is advice.
std::vector<std::string> Unknown(const Known& known, const std::string& text, bool anywhere,
                                 int* named) {
  static const std::regex introduced(
      "(?:`|[:,(] ?|\\b(?:with|call|then|see|or) )heddle ([a-z][a-z-]*)(?: ([a-z-]+))?");
  static const std::regex any("heddle ([a-z][a-z-]*)(?: ([a-z-]+))?");
  std::vector<std::string> unknown;
  for (std::sregex_iterator it(text.begin(), text.end(), anywhere ? any : introduced), end;
       it != end; ++it) {
    const std::string first = (*it)[1];
    const std::string both = first + " " + (*it)[2].str();
    ++*named;
    if (known.groups.contains(first) ? !known.verbs.contains(both) : !known.verbs.contains(first)) {
      unknown.push_back("heddle " + both);
    }
  }
  return unknown;
}

TEST(NamedVerbs, AreLookedForAsTheyAreWritten) {
  const Known known;
  int named = 0;
  EXPECT_EQ(Unknown(known, "correct it: heddle weave CONFIG", false, &named).size(), 1u);
  EXPECT_EQ(Unknown(known, "heddle bisect JOB names the rank", true, &named).size(), 1u);
  EXPECT_EQ(Unknown(known, "one with heddle node mend NODE", false, &named).size(), 1u);
  EXPECT_EQ(Unknown(known, "`heddle node ls`, heddle resume JOB", false, &named).size(), 0u);
  EXPECT_EQ(named, 5);
  EXPECT_EQ(Literals("Str(\"run: heddle \"\n  \"fork\", x)"), "run: heddle fork\n");
}

TEST(NamedVerbs, OfTheTableOfCausesExist) {
  int named = 0;
  for (const std::string& verb :
       Unknown(Known(), Literals(ReadAll(Root() / "base/causes.def")), true, &named)) {
    ADD_FAILURE() << "base/causes.def: no verb `" << verb << "`";
  }
  EXPECT_GE(named, 10);
}

TEST(NamedVerbs, OfAdviceAndErrorsExist) {
  const Known known;
  int named = 0;
  for (const char* folder :
       {"base", "checkpoint", "cli", "coordinator", "data", "model", "worker"}) {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(Root() / folder)) {
      const std::string extension = entry.path().extension();
      if (extension != ".cc" && extension != ".h") continue;
      for (const std::string& verb :
           Unknown(known, Literals(ReadAll(entry.path())), false, &named)) {
        ADD_FAILURE() << entry.path() << ": no verb `" << verb << "`";
      }
    }
  }
  EXPECT_GE(named, 8);
}

}  // namespace
}  // namespace heddle::cli
