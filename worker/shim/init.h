// `heddle-shim init -- CMD...`: process 1 of a container (formats F52). It reaps, forwards signals
// and restarts a crashed daemon, because the end of process 1 would end every trainer.
#pragma once

namespace heddle::shim {

// Runs until `argv` ends by itself (status 0, or 2: wrong usage) or after a SIGTERM or SIGINT that
// was forwarded. Returns the exit status.
int RunInit(char** argv);

}  // namespace heddle::shim
