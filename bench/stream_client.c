/* Round trips of one TPM command over a Unix socket: prints one duration in ns a line.
   usage: stream_client PATH WARM_UP COUNT COMMAND_HEX */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    unsigned char command[4096], response[4096];
    struct sockaddr_un where = { .sun_family = AF_UNIX };
    size_t size = 0;
    if (argc != 5 || strlen(argv[1]) >= sizeof where.sun_path)
        return 2;
    for (const char *h = argv[4]; h[0] && h[1] && size < sizeof command; h += 2, size++) {
        unsigned byte;
        if (sscanf(h, "%2x", &byte) != 1)
            return 2;
        command[size] = byte;
    }
    strcpy(where.sun_path, argv[1]);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&where, sizeof where) != 0) {
        perror(argv[1]);
        return 1;
    }
    int warm_up = atoi(argv[2]), count = atoi(argv[3]);
    long long *times = malloc(sizeof *times * (size_t)count);
    for (int i = -warm_up; i < count; i++) {
        long long start = now();
        if (write(fd, command, size) != (ssize_t)size || read(fd, response, sizeof response) < 10
            || memcmp(response + 6, "\0\0\0\0", 4) != 0) {
            fprintf(stderr, "round trip %d failed\n", i);
            return 1;
        }
        if (i >= 0)
            times[i] = now() - start;
    }
    for (int i = 0; i < count; i++)
        printf("%lld\n", times[i]);
    return 0;
}
