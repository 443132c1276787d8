/* flooding: sends to the socket of NOTIFY_SOCKET for ever, as fast as it is read,
 * or, without that variable, long and short lines to standard output. */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char STATUS[] = "STATUS=flooding\n";

static int flood_socket(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return 3;
    while (send(fd, STATUS, sizeof STATUS - 1, 0) > 0)
        continue;
    return 4;
}

int main(void)
{
    static char block[65536];
    const char *path = getenv("NOTIFY_SOCKET");

    if (path)
        return flood_socket(path);
    memset(block, 'x', sizeof block);
    for (size_t at = 40, length = 40; at < sizeof block; at += length) {
        block[at] = '\n';
        length = length == 40 ? 400 : 40;
    }
    while (write(1, block, sizeof block) > 0)
        continue;
    return 5;
}
