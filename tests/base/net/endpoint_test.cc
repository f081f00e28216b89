#include "base/net/endpoint.h"

#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace heddle::net {
namespace {

TEST(Endpoint, ReadsAndWritesEveryForm) {
  const struct {
    const char* text;
    const char* canonical;
  } cases[] = {{"unix:/run/heddle/c.sock", "unix:/run/heddle/c.sock"},
               {"unix:///run/c.sock", "unix:/run/c.sock"},
               {"unix:relative.sock", "unix:relative.sock"},
               {"127.0.0.1:7077", "127.0.0.1:7077"},
               {"node-3.example:65535", "node-3.example:65535"},
               {"[::1]:0", "[::1]:0"}};
  for (const auto& one : cases) {
    const StatusOr<Endpoint> endpoint = ParseEndpoint(one.text);
    ASSERT_OK(endpoint) << one.text;
    EXPECT_EQ(ToText(*endpoint), one.canonical);
  }
}

TEST(Endpoint, RefusesWhatIsNoAddress) {
  for (const char* text : {"", "unix:", "localhost", ":80", "host:", "host:65536", "host:-1",
                           "host:8o", "::1:80", "[]:80"}) {
    EXPECT_STATUS(ParseEndpoint(text), StatusCode::kInvalidArgument, text);
  }
  EXPECT_STATUS(ParseEndpoint("unix:/" + std::string(120, 'p')), StatusCode::kInvalidArgument,
                "allows 107");
}

TEST(Security, OpenNetworksNeedTlsAndLoopbackAWord) {
  const auto check = [](const char* address, bool tls, bool insecure) {
    Security security;
    security.insecure_loopback = insecure;
    if (tls) {
      security.tls = {.ca = "ca", .cert = "cert", .key = "key"};
    }
    return CheckSecurity(*ParseEndpoint(address), security).ok();
  };
  EXPECT_TRUE(check("unix:/s", false, false));
  for (const char* loopback : {"127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"}) {
    EXPECT_FALSE(check(loopback, false, false)) << loopback;
    EXPECT_TRUE(check(loopback, false, true)) << loopback;
    EXPECT_TRUE(check(loopback, true, false)) << loopback;
  }
  for (const char* open : {"0.0.0.0:1", "10.0.0.1:1", "127.evil.example:1", "[::]:1"}) {
    EXPECT_FALSE(check(open, false, true)) << open;
    EXPECT_TRUE(check(open, true, false)) << open;
  }
}

TEST(Security, HalfAnIdentityIsNone) {
  Security security;
  security.tls.cert = "cert";
  EXPECT_STATUS(CheckSecurity(*ParseEndpoint("unix:/s"), security), StatusCode::kInvalidArgument,
                "all of --tls-ca, --tls-cert and --tls-key");
}

}  // namespace
}  // namespace heddle::net
