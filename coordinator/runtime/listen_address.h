// Whether an address can be listened on, found out before anything is changed: gRPC would take a
// unix socket from whoever serves it, without a word.
#pragma once

#include <string>

#include "base/net/endpoint.h"
#include "base/status/status.h"

namespace heddle::runtime {

// OK if nobody listens there; the socket file of a process that is gone is removed.
// FAILED_PRECONDITION: in use, or a file that is no socket; that file is left as it is.
Status CheckFree(const net::Endpoint& endpoint);

}  // namespace heddle::runtime
