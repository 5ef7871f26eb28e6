/* Round trips of one TPM command on a device: prints one duration in ns a line.
   usage: device_client DEVICE COUNT COMMAND_HEX */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
    size_t size = 0;
    if (argc != 4)
        return 2;
    for (const char *h = argv[3]; h[0] && h[1] && size < sizeof command; h += 2, size++) {
        unsigned byte;
        if (sscanf(h, "%2x", &byte) != 1)
            return 2;
        command[size] = byte;
    }
    int fd = open(argv[1], O_RDWR);
    int count = atoi(argv[2]);
    long long *times = malloc(sizeof *times * count);
    if (fd < 0 || !times) {
        perror(argv[1]);
        return 1;
    }
    for (int i = 0; i < count; i++) {
        long long start = now();
        if (write(fd, command, size) != (ssize_t)size || read(fd, response, sizeof response) < 10
            || memcmp(response + 6, "\0\0\0\0", 4) != 0) {
            fprintf(stderr, "round trip %d failed\n", i);
            return 1;
        }
        times[i] = now() - start;
    }
    for (int i = 0; i < count; i++)
        printf("%lld\n", times[i]);
    return 0;
}
