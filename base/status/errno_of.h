// The errno behind a status: the code alone does not tell a broken disk (EIO) from damaged
// contents, nor a full one (ENOSPC) from a lack of memory.
#pragma once

#include "base/status/status.h"

namespace heddle {

// The `error` that FromErrno was given, also through Annotate; 0 if the status came otherwise. It
// does not travel between processes.
int ErrnoOf(const Status& status);

}  // namespace heddle
