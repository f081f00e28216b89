// Real handshakes: who may connect to a listener with mutual TLS.
#include "base/net/grpc_channel.h"

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <string>

#include "tests/support/status_matchers.h"

namespace heddle::net {
namespace {

using KeyPtr = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using CertPtr = std::unique_ptr<X509, decltype(&X509_free)>;

// A throw-away authority and what it signs, as PEM files of a folder.
class Authority {
 public:
  Authority(std::string dir, const std::string& name)
      : dir_(std::move(dir)), key_(NewKey()), cert_(Make(name, key_.get(), nullptr, nullptr)) {
    WriteCert(Path(name + "-ca.pem"), cert_.get());
    ca_path_ = Path(name + "-ca.pem");
  }

  TlsFiles Issue(const std::string& name) const {
    const KeyPtr key = NewKey();
    const CertPtr cert = Make(name, key.get(), cert_.get(), key_.get());
    WriteCert(Path(name + ".pem"), cert.get());
    FILE* file = fopen(Path(name + ".key").c_str(), "w");
    PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
    fclose(file);
    return {.ca = ca_path_, .cert = Path(name + ".pem"), .key = Path(name + ".key")};
  }

 private:
  static KeyPtr NewKey() { return KeyPtr(EVP_EC_gen("P-256"), EVP_PKEY_free); }
  std::string Path(const std::string& name) const { return dir_ + "/" + name; }
  static void WriteCert(const std::string& path, X509* cert) {
    FILE* file = fopen(path.c_str(), "w");
    PEM_write_X509(file, cert);
    fclose(file);
  }
  static void Extend(X509* cert, X509* issuer, int nid, const char* value) {
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, cert, nullptr, nullptr, 0);
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value);
    X509_add_ext(cert, extension, -1);
    X509_EXTENSION_free(extension);
  }
  // Self-signed without an issuer.
  static CertPtr Make(const std::string& name, EVP_PKEY* key, X509* issuer, EVP_PKEY* issuer_key) {
    static int64_t serial = 100;
    CertPtr cert(X509_new(), X509_free);
    X509_set_version(cert.get(), 2);
    ASN1_INTEGER_set_int64(X509_get_serialNumber(cert.get()), ++serial);
    X509_gmtime_adj(X509_getm_notBefore(cert.get()), -3600);
    X509_gmtime_adj(X509_getm_notAfter(cert.get()), 3600);
    X509_set_pubkey(cert.get(), key);
    X509_NAME* subject = X509_get_subject_name(cert.get());
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509_set_issuer_name(cert.get(), issuer == nullptr ? subject : X509_get_subject_name(issuer));
    X509* const signer = issuer == nullptr ? cert.get() : issuer;
    Extend(cert.get(), signer, NID_basic_constraints, issuer == nullptr ? "CA:TRUE" : "CA:FALSE");
    Extend(cert.get(), signer, NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
    X509_sign(cert.get(), issuer_key == nullptr ? key : issuer_key, EVP_sha256());
    return cert;
  }

  const std::string dir_;
  const KeyPtr key_;
  const CertPtr cert_;
  std::string ca_path_;
};

class MutualTls : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/heddle-tls-XXXXXX";
    dir_ = mkdtemp(pattern);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  // A listener with `files` on a free loopback port; its address.
  std::string Listen(const TlsFiles& files) {
    Security security;
    security.tls = files;
    const Endpoint endpoint = ParseEndpoint("127.0.0.1:0").value();
    const auto credentials = MakeServerCredentials(endpoint, security);
    EXPECT_OK(credentials);
    grpc::ServerBuilder builder;
    ConfigureServer(&builder);
    int port = 0;
    builder.AddListeningPort(ToText(endpoint), *credentials, &port);
    builder.RegisterAsyncGenericService(&nothing_);
    queue_ = builder.AddCompletionQueue();
    server_ = builder.BuildAndStart();
    return "127.0.0.1:" + std::to_string(port);
  }
  static bool Connects(const std::string& address, const Security& security, int wait_ms) {
    const auto channel = OpenChannel(*ParseEndpoint(address), security);
    EXPECT_OK(channel);
    return (*channel)->WaitForConnected(std::chrono::system_clock::now() +
                                        std::chrono::milliseconds(wait_ms));
  }
  ~MutualTls() override {
    if (server_ != nullptr) {
      server_->Shutdown();
      queue_->Shutdown();
      void* tag = nullptr;
      bool ok = false;
      while (queue_->Next(&tag, &ok)) {
      }
    }
  }

  std::string dir_;
  grpc::AsyncGenericService nothing_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(MutualTls, OnlyCertificatesOfTheAuthorityConnect) {
  const Authority ours(dir_, "ours");
  const Authority theirs(dir_, "theirs");
  const std::string address = Listen(ours.Issue("coordinator"));
  Security good;
  good.tls = ours.Issue("worker");
  EXPECT_TRUE(Connects(address, good, 10'000));

  Security stranger;
  stranger.tls = theirs.Issue("stranger");
  stranger.tls.ca = good.tls.ca;  // trusts us, is not trusted
  EXPECT_FALSE(Connects(address, stranger, 1'500));
  Security naked;
  naked.insecure_loopback = true;
  EXPECT_FALSE(Connects(address, naked, 1'500));
  Security wary;
  wary.tls = ours.Issue("wary");
  wary.tls.ca = theirs.Issue("unused").ca;  // does not trust us
  EXPECT_FALSE(Connects(address, wary, 1'500));
}

TEST_F(MutualTls, AMissingOrForeignFileIsNamed) {
  Security security;
  security.tls = {.ca = dir_ + "/none", .cert = dir_ + "/none", .key = dir_ + "/none"};
  const Endpoint endpoint = *ParseEndpoint("127.0.0.1:1");
  EXPECT_STATUS(MakeServerCredentials(endpoint, security), StatusCode::kNotFound, dir_ + "/none");
  security.tls.ca = "/proc/self/cmdline";
  EXPECT_STATUS(OpenChannel(endpoint, security), StatusCode::kInvalidArgument, "not a PEM file");
}

TEST(Codes, AreTheSameOnBothSides) {
  for (int code = 1; code <= 16; ++code) {
    const Status status(static_cast<StatusCode>(code), "why");
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status) << code;
  }
  EXPECT_OK(FromGrpc(grpc::Status::OK));
  EXPECT_STATUS(FromGrpc({grpc::StatusCode::UNAVAILABLE, "Socket closed"}),
                StatusCode::kUnavailable, "TLS certificate");
}

}  // namespace
}  // namespace heddle::net
