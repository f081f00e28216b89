// Lets a rank show where its threads are, to a reader of its page (training-runtime.md 17.2). Only
// addresses are written, since names cannot be looked up inside a signal handler: the daemon finds
// them in the files that /proc/PID/maps names.
#pragma once

namespace heddle::control {

class RankPage;

// From now on SIGUSR2 makes the thread that gets it write its stack into `page`, which is borrowed
// and never unmapped afterwards; then says so in the page. One page per process. The caller's
// threads see interrupted system calls, as SA_RESTART allows.
void DumpStacksOnSignal(RankPage* page);

}  // namespace heddle::control
