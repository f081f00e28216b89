// Server streams of jobs: history first, then what happens, without gap or repeat. Each feed reads
// the history in pieces as fast as its reader takes them, and subscribes in the turn of the state
// thread in which it has caught up.
#pragma once

#include <string>

#include "heddle/v1/jobs.pb.h"

namespace grpc {
template <typename Frame>
class ServerWriteReactor;
}

namespace heddle::rpc {

class Core;
class LogFiles;

grpc::ServerWriteReactor<v1::WatchFrame>* StartWatch(Core* core, const v1::WatchRequest& request);
grpc::ServerWriteReactor<v1::MetricPoint>* StartMetrics(Core* core,
                                                        const v1::MetricsRequest& request);
grpc::ServerWriteReactor<v1::LogLine>* StartLogs(Core* core, LogFiles* logs,
                                                 const v1::LogsRequest& request);

}  // namespace heddle::rpc
