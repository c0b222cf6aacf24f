#include "common/error.h"

#include <cerrno>
#include <system_error>

namespace ringfold {

Error SystemError(const std::string& what) {
  return {ErrorCode::kSystem, -1, what + ": " + std::system_category().message(errno)};
}

}  // namespace ringfold
