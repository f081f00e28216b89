#include "coordinator/rpc/request.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/message.h>
#include <grpcpp/server_context.h>
#include <openssl/evp.h>

namespace heddle::rpc {

std::string IdentityOf(const grpc::CallbackServerContext& context) {
  if (context.peer().rfind("unix:", 0) == 0) {
    return "local";
  }
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth != nullptr && auth->IsPeerAuthenticated()) {
    for (const grpc::string_ref& name : auth->FindPropertyValues("x509_common_name")) {
      return std::string(name.data(), name.size());
    }
  }
  return "anonymous";
}

std::string DigestOf(const google::protobuf::Message& request) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream raw(&bytes);
    google::protobuf::io::CodedOutputStream coded(&raw);
    coded.SetSerializationDeterministic(true);
    request.SerializeToCodedStream(&coded);
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  EVP_Digest(bytes.data(), bytes.size(), digest, &length, EVP_sha256(), nullptr);
  return std::string(reinterpret_cast<const char*>(digest), length);
}

state::ClientRequest MakeClientRequest(const grpc::CallbackServerContext& context,
                                       const google::protobuf::Message& request,
                                       const std::string& request_id) {
  return {.identity = IdentityOf(context),
          .request_id = request_id,
          .digest = DigestOf(request),
          .expect_version = 0};
}

}  // namespace heddle::rpc
