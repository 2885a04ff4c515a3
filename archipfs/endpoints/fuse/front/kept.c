#include "kept.h"

#include <stdlib.h>
#include <string.h>

struct af_kept *af_kept_make(struct af_entry *entry, const struct af_request *request, const char *message,
                             size_t length, size_t room_bytes) {
    struct af_kept *kept = malloc(sizeof *kept + length + room_bytes);
    if (kept == NULL)
        return NULL;
    *kept = (struct af_kept){.entry = entry, .request = *request, .length = length};
    memcpy(kept->message, message, length);
    kept->room = kept->message + length;
    if (request->data != NULL)
        kept->request.data = kept->message + ((const char *)request->data - message);
    return kept;
}
